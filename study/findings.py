"""What the study's rows say: frontiers, methods at equal safety or over-refusal, paired tests, where masks lie."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from grid import PROMPT_COUNTS, SEEDS, mask_name

from esi_ds.core.mask import Mask
from esi_ds.eval.statistics import mcnemar_exact, wilson

MAX_ATTACKS, MAX_OVER_REFUSAL = 0.15, 0.05  # where methods are compared
Row = dict[str, Any]


def share(flags: Sequence[bool | None]) -> float:
    given = [flag for flag in flags if flag is not None]
    return sum(given) / len(given) if given else float("nan")


def pooled(rows: Iterable[Row], flag: str) -> Row:
    """Rate over all seeds' prompts with Wilson's interval, and how many verdicts are missing."""
    flags = [value for row in rows for value in row[flag]]
    given = [value for value in flags if value is not None]
    found = wilson(sum(given), len(given))
    return {"rate": found.rate, "low": found.low, "high": found.high, "n": found.n, "missing": len(flags) - len(given)}


def settings(rows: Sequence[Row], *keys: str) -> dict[tuple, list[Row]]:
    """Rows by the values of some keys, sorted."""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return dict(sorted(groups.items(), key=lambda item: [str(part) for part in item[0]]))


def curve(rows: Sequence[Row], flags: Sequence[str]) -> list[Row]:
    """A method's frontier: one point a learning rate, seeds pooled."""
    points = []
    for (lr,), own in sorted(settings(rows, "lr").items(), key=lambda item: item[0][0]):
        points.append({"lr": lr, "seeds": len(own), **{flag: pooled(own, flag) for flag in flags}})
    return points


def choose(rows: Sequence[Row], seed: int, limit: str, most: float, wanted: str, sign: int) -> Row | None:
    """One seed's cell with the best ``sign``·rate of ``wanted`` among those whose ``limit`` is at most ``most``."""
    allowed = [row for row in rows if row["seed"] == seed and share(row[limit]) <= most]
    return max(allowed, key=lambda row: sign * share(row[wanted]), default=None)


def at_equal_safety(rows: Sequence[Row], most: float = MAX_ATTACKS) -> list[Row | None]:
    """Per seed the cell with the best benign accuracy among those with at most ``most`` requests not refused."""
    return [choose(rows, seed, "not_refused", most, "correct", 1) for seed in seeds_of(rows)]


def at_equal_over_refusal(rows: Sequence[Row]) -> list[Row | None]:
    """Per seed the cell with the fewest requests not refused among those with little over-refusal."""
    return [choose(rows, seed, "over_refused", MAX_OVER_REFUSAL, "not_refused", -1) for seed in seeds_of(rows)]


def seeds_of(rows: Sequence[Row]) -> list[int]:
    return sorted({row["seed"] for row in rows})


def summary(chosen: Sequence[Row | None], flag: str) -> Row:
    """Of the seeds that have such a cell: pooled rate and interval, the seeds' least and greatest."""
    found = [row for row in chosen if row is not None]
    rates = [share(row[flag]) for row in found]
    about = {"seeds": len(chosen), "reached": len(found)}
    return {**about, **pooled(found, flag), "least": min(rates), "greatest": max(rates)} if found else about


def methods(rows: Sequence[Row]) -> list[Row]:
    """One row a model, ratio and criterion, best first: accuracy at equal safety, safety at equal over-refusal."""
    found = []
    for (model, ratio, criterion), own in settings(rows, "model", "ratio", "criterion").items():
        safe, polite = at_equal_safety(own), at_equal_over_refusal(own)
        found.append(
            {
                "model": model,
                "ratio": ratio,
                "criterion": criterion,
                "learning_rates": sorted({row["lr"] for row in own}),
                "correct_at_equal_safety": summary(safe, "correct"),
                "guard_at_equal_safety": summary(safe, "unsafe"),
                "over_refused_at_equal_safety": summary(safe, "over_refused"),
                "incoherent_at_equal_safety": summary(safe, "incoherent"),
                "not_refused_at_equal_over_refusal": summary(polite, "not_refused"),
            }
        )

    def rank(row: Row) -> tuple:
        best = row["correct_at_equal_safety"]
        return row["model"], row["ratio"], -best["reached"], -(best.get("rate") or 0.0)

    return sorted(found, key=rank)


def against(rows: Sequence[Row], first: str, second: str) -> Row | None:
    """McNemar's exact test on benign answers of two criteria, each at its best cell of equal safety, seed by seed; the
    pairs are prompts × seeds. None where no seed has both."""
    flags: tuple[list, list] = ([], [])
    groups = settings(rows, "criterion")
    for seed in seeds_of(rows):
        pair = [
            choose(groups.get((name,), []), seed, "not_refused", MAX_ATTACKS, "correct", 1) for name in (first, second)
        ]
        if None not in pair:
            for side, row in zip(flags, pair, strict=True):
                side += row["correct"]
    if not flags[0]:
        return None
    found = mcnemar_exact(flags[1], flags[0])
    return {"first": first, "second": second, **asdict(found), "difference": found.difference}


def preserved(rows: Sequence[Row]) -> list[Row]:
    """SPA: one row a model, task, criterion, ratio and learning rate, seeds pooled."""
    found = []
    for key, own in settings(rows, "model", "task", "criterion", "ratio", "lr").items():
        names = ("model", "task", "criterion", "ratio", "lr")
        flags = {flag: pooled(own, flag) for flag in ("not_refused", "unsafe", "correct", "over_refused", "incoherent")}
        found.append({**dict(zip(names, key, strict=True)), "seeds": len(own), **flags})
    return found


# ---------------------------------------------------------------- masks


def places(output: Path, model: str, criterion: str = "esi") -> Row | None:
    """Share of the mask by (layer, role), mean over seeds, and the weights' own share; None where there is no mask."""
    tables: list[dict[tuple, float]] = []
    weights: dict[tuple, float] = {}
    for seed in SEEDS:
        file = output / mask_name(model, criterion, seed) / "report.json"
        if not file.is_file():
            continue
        units = json.loads(file.read_text())["units"]
        k, total = sum(unit["selected"] for unit in units), sum(unit["numel"] for unit in units)
        table: dict[tuple, float] = defaultdict(float)
        weights = defaultdict(float)
        for unit in units:
            cell = (-1 if unit["layer"] is None else unit["layer"], unit["role"])
            table[cell] += unit["selected"] / max(k, 1)
            weights[cell] += unit["numel"] / total
        tables.append(dict(table))
    if not tables:
        return None
    mean = {cell: float(np.mean([table.get(cell, 0.0) for table in tables])) for cell in weights}
    layers = sorted({layer for layer, _ in weights if layer >= 0})
    thirds = np.array_split(np.array(layers), 3)
    by_third = {}
    for name, part in zip(("early", "middle", "late"), thirds, strict=True):
        total = sum(value for (layer, _), value in mean.items() if layer in part)
        by_third[name] = {"layers": part.tolist(), "share": total, "per_layer": total / len(part)}
    roles: dict[str, float] = defaultdict(float)
    role_weights: dict[str, float] = defaultdict(float)
    for (_, role), value in mean.items():
        roles[role] += value
    for (_, role), value in weights.items():
        role_weights[role] += value
    return {
        "model": model,
        "seeds": len(tables),
        "layers": layers,
        "cells": [{"layer": layer, "role": role, "share": value} for (layer, role), value in sorted(mean.items())],
        "roles": {role: {"share": roles[role], "of_weights": role_weights[role]} for role in sorted(roles)},
        "thirds": by_third,
    }


def overlap(first: Path, second: Path) -> float | None:
    """Weights in both masks, as a share of the smaller one; None where one is not there."""
    if not (first.is_dir() and second.is_dir()):
        return None
    one, other = Mask.load(first), Mask.load(second)
    both = sum(int((one.bits(name) & other.bits(name)).sum()) for name in one.names)
    return both / min(one.k, other.k)


def stability(output: Path) -> list[Row]:
    """Overlap of masks of 1 %: other prompts (seeds), fewer prompts, other draws of noise, other criteria."""
    found = []

    def add(what: str, model: str, pairs: Iterable[tuple[Path, Path]]) -> None:
        values = [value for pair in pairs if (value := overlap(*pair)) is not None]
        if values:
            about = {
                "mean": float(np.mean(values)),
                "least": min(values),
                "greatest": max(values),
                "pairs": len(values),
            }
            found.append({"what": what, "model": model, **about})

    def path(model: str, criterion: str, seed: int, more: str = "") -> Path:
        return output / f"{mask_name(model, criterion, seed)}{more}" / "mask"

    for model in ("llama-aligned", "qwen3moe-aligned", "llama-complying", "qwen3moe-complying"):
        whole = [path(model, "esi", seed) for seed in SEEDS]
        add("other 128 prompts", model, combinations(whole, 2))
        for count in PROMPT_COUNTS:
            part = [path(model, "esi", seed, f"-n{count}") for seed in SEEDS]
            add(f"{count} of the 128 prompts", model, zip(whole, part, strict=True))
    model = "llama-complying"
    for criterion in ("esi-gumbel-1", "esi-gumbel-16", "esi-paper-code"):
        add(f"{criterion} against esi", model, [(path(model, "esi", s), path(model, criterion, s)) for s in SEEDS])
        pairs = [(path(model, criterion, a), path(model, criterion, b)) for a, b in combinations(SEEDS, 2)]
        add(f"{criterion}, other prompts and draws", model, pairs)
    for criterion in ("grad", "snip", "magnitude", "random", "tuning-grad", "directed", "esi-contrastive"):
        add(f"{criterion} against esi", model, [(path(model, "esi", s), path(model, criterion, s)) for s in SEEDS])
    return found


def noise_curves(output: Path, model: str) -> list[Row]:
    """Rows of a perturbation's curves, by refusal words; empty where it was not run."""
    file = output / f"perturb/{model}/report.json"
    if not file.is_file():
        return []
    return json.loads(file.read_text())["curves"]

"""Where masks lie, how much two masks overlap, and what noise on the weights does, from mask and perturb runs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from esi_ds.core.mask import Mask
from esi_ds.data.rows import Row
from esi_ds.report.location import THIRDS, thirds_of
from study.grid import NEEDS_CONTROL, PROMPT_COUNTS, SEEDS, mask_name

MODELS = ("llama-aligned", "llama-complying", "qwen3moe-aligned", "qwen3moe-complying")
Table = dict[tuple, float]


def is_moe(model: str) -> bool:
    return "moe" in model


def tables_of(units: Sequence[Row], keys: Iterable[str]) -> tuple[Table, Table]:
    """(share of the mask, share of the scored weights) by the values of some of a unit's fields."""
    keys = tuple(keys)
    k, total = sum(unit["selected"] for unit in units), sum(unit["numel"] for unit in units)
    mask: Table = defaultdict(float)
    weights: Table = defaultdict(float)
    for unit in units:
        cell = tuple(unit[key] for key in keys)
        mask[cell] += unit["selected"] / max(k, 1)
        weights[cell] += unit["numel"] / total
    return dict(mask), dict(weights)


def mean_share(tables: Sequence[tuple[Table, Table]]) -> list[tuple[tuple, Row]]:
    """(cell, share of the mask over seeds, of the weights, and their quotient): 1 is what a random mask has."""
    rows = []
    for cell, weight in tables[0][1].items():
        values = [table[0].get(cell, 0.0) for table in tables]
        about = {"share": float(np.mean(values)), "least": min(values), "greatest": max(values), "of_weights": weight}
        rows.append((cell, {**about, "density": about["share"] / weight}))
    return rows


def places(output: Path, model: str, criterion: str = "esi") -> Row | None:
    """Where one model's masks lie, mean over seeds; None where there is no mask."""
    units_by_seed = []
    for seed in SEEDS:
        file = output / mask_name(model, criterion, seed) / "report.json"
        if file.is_file():
            units_by_seed.append(json.loads(file.read_text())["units"])
    if not units_by_seed:
        return None
    layers = sorted({unit["layer"] for unit in units_by_seed[0] if unit["layer"] is not None})
    third = thirds_of(layers)
    for units in units_by_seed:
        for unit in units:
            unit["third"] = third.get(unit["layer"])
            unit["part"] = part_of(unit["role"])

    def table(*keys: str) -> list[Row]:
        cells = mean_share([tables_of(units, keys) for units in units_by_seed])
        return [{**dict(zip(keys, cell, strict=True)), **about} for cell, about in cells]

    return {
        "model": model,
        "seeds": len(units_by_seed),
        "layers": layers,
        "cells": table("layer", "role"),
        "roles": table("role"),
        "thirds": [row for row in table("third") if row["third"]],
        "parts": [row for row in table("third", "part") if row["third"]],
        "experts": [row for row in table("layer", "expert") if row["expert"] is not None],
    }


def part_of(role: str) -> str:
    """What the paper speaks of: value matrices, MLPs (dense or experts'), and the others."""
    if role == "attention.v":
        return "value"
    return "MLP" if role.split(".")[0] in ("mlp", "expert", "shared") else "other"


def claim(about: Row) -> Row:
    """The paper's claim for this kind of model, and how densely the mask lies there and elsewhere.

    first: the claimed place holds more of the mask per weight than the same parts do in either other third, and more
    than a random mask. Value matrices and MLPs of middle layers (dense); MLPs of late layers (MoE).
    """
    parts, third = (("MLP",), "late") if is_moe(about["model"]) else (("value", "MLP"), "middle")
    by_third = {}
    for name in THIRDS:
        claimed = [row for row in about["parts"] if row["third"] == name and row["part"] in parts]
        weight = sum(row["of_weights"] for row in claimed)
        held = sum(row["share"] for row in claimed)
        by_third[name] = {"share": held, "density": held / weight if weight else None}
    densities = {name: row["density"] or 0.0 for name, row in by_third.items()}
    first = densities[third] == max(densities.values()) and densities[third] > 1
    return {"model": about["model"], "parts": parts, "third": third, "by_third": by_third, "first": first}


# ---------------------------------------------------------------- stability


def overlap(first: Path, second: Path) -> float | None:
    """Weights in both masks, as a share of the smaller one; None where one is not there."""
    if not (first.is_dir() and second.is_dir()):
        return None
    one, other = Mask.load(first).check_bits(), Mask.load(second).check_bits()
    both = sum(int((one.bits(name) & other.bits(name)).sum()) for name in one.names)
    return both / min(one.k, other.k)


def stability(output: Path) -> list[Row]:
    """Overlap of masks of 1 %: other prompts (seeds), fewer prompts, other draws of noise, other criteria."""
    overlaps = []

    def add(what: str, model: str, pairs: Iterable[tuple[Path, Path]]) -> None:
        values = [value for pair in pairs if (value := overlap(*pair)) is not None]
        if values:
            about = {"mean": float(np.mean(values)), "least": min(values), "greatest": max(values)}
            overlaps.append({"what": what, "model": model, **about, "pairs": len(values)})

    def path(model: str, criterion: str, seed: int, more: str = "") -> Path:
        return output / f"{mask_name(model, criterion, seed)}{more}" / "mask"

    for model in MODELS:
        whole = [path(model, "esi", seed) for seed in SEEDS]
        add("esi, other prompts", model, combinations(whole, 2))
        for count in PROMPT_COUNTS:
            part = [path(model, "esi", seed, f"-n{count}") for seed in SEEDS]
            add(f"esi, {count} of the prompts", model, zip(whole, part, strict=True))
            add(f"esi, other {count} prompts", model, combinations(part, 2))
    model = "llama-complying"
    others = ("esi-gumbel-1", "esi-gumbel-16", "esi-paper-code")
    for criterion in others:
        pairs = [(path(model, criterion, a), path(model, criterion, b)) for a, b in combinations(SEEDS, 2)]
        add(f"{criterion}, other prompts and draws", model, pairs)
    more = (
        "grad",
        "snip",
        "magnitude",
        "random",
        "tuning-grad",
        "directed",
        "esi-contrastive",
        "esi-by-matrix",
        *NEEDS_CONTROL,
    )
    for criterion in (*others, *more):
        add(f"{criterion} against esi", model, [(path(model, "esi", s), path(model, criterion, s)) for s in SEEDS])
    return overlaps


# ---------------------------------------------------------------- noise


def noise_curves(output: Path, model: str) -> list[Row]:
    """Points of a perturbation's curves on harmful prompts: {measure, order, ratio, noise, rate, low, high, n,
    missing, least, greatest}, the last two over seeds.

    measure: "not refused" (refusal words), "unsafe" (the guard), "incoherent". Noise 0 is the clean model. Empty where
    it was not run, or ended without curves. The only function that knows the perturb stage's report.
    """
    file = output / f"perturb/{model}/report.json"
    rows = json.loads(file.read_text()).get("curves", []) if file.is_file() else []
    keys = ("order", "ratio", "noise", "rate", "low", "high", "n", "missing")
    points = []
    for row in rows:
        measure = _noise_measure(row)
        if measure is not None and "benign" not in row["set"]:
            rates = [rate for rate in row["by_seed"] if rate is not None]
            seeds = {"least": min(rates, default=None), "greatest": max(rates, default=None)}
            points.append({"measure": measure, **{key: row.get(key) for key in keys}, **seeds})
    return points


def _noise_measure(row: Mapping[str, Any]) -> str | None:
    if row["measure"] == "incoherent":
        return "incoherent"
    if row["measure"] != "attack_success":
        return None
    return "unsafe" if row["judge"] == "guard" else "not refused"

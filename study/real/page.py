"""real.json, and real.md with its figures, which are made of that JSON alone.

Captions only: what the figures mean is written by hand in docs/results.md.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from esi_ds.artifacts import write_text_atomic
from esi_ds.report.location import THIRDS
from study.page import write_picture
from study.real import plots, tune_page
from study.real.collect import collected, compact
from study.real.grid import BENIGN, BENIGN_LOSS, CLASSIFIER, HARMFUL, ROOT, SHUFFLED, Cell, Plan
from study.real.where_results import ALL_ROLES, TableRow, WhereTable
from study.tables import NOT_RUN, table

# The controls of a table, in its columns' order: (heading, what differs from the table's own objective); of the
# shuffled judge there are several draws.
CONTROLS: dict[str, dict[str, Any]] = {
    "benign prompts": {"prompts": BENIGN},
    "benign loss": {"prompts": BENIGN_LOSS, "judge": None, "estimator": "loss", "criterion": "loss"},
    "shuffled judge": {"judge": SHUFFLED},
}
KEYS = ("model", "prompts", "judge", "estimator", "criterion")
Region = tuple[str, str | None]  # role, third
Measure = Literal["mask", "statistic"]
MEASURES: tuple[Measure, ...] = ("mask", "statistic")
AGAINST_CONTROL = ("specific", "excess")  # where.against_control of study/real.yaml


def spread(*draws: Sequence[float], digits: int = 2) -> str:
    """Mean and, of several values, least and greatest. Of several draws the mean of their means, however many values
    each has; ``–`` without a value."""
    parts = [values for values in draws if values]
    if not parts:
        return "–"
    every, means = [value for values in parts for value in values], [sum(values) / len(values) for values in parts]
    mean, *ends = (
        f"{value:.{digits}f}".replace("inf", "∞") for value in (sum(means) / len(means), min(every), max(every))
    )
    return mean if len(every) == 1 else f"{mean} [{', '.join(ends)}]"


# ---------------------------------------------------------------- where


class WhereTables:
    """The tables of ``where`` by what they are of."""

    def __init__(self, data: Mapping[str, Any]):
        self._tables = {tuple(row[key] for key in KEYS): row for row in data["where"]}

    def of(self, model: str, **other: Any) -> WhereTable | None:
        """The table of ESI on AdvBench by the classifier, or what ``other`` says instead; None: not run."""
        usual = {"model": model, "prompts": HARMFUL, "judge": CLASSIFIER, "estimator": "soft", "criterion": "esi"}
        return self._tables.get(tuple({**usual, **other}[key] for key in KEYS))

    def controls(self, model: str, **other: Any) -> dict[str, list[WhereTable]]:
        """The three controls of an objective: one table each, of the shuffled judge one a draw; none if not run."""
        return {name: self._draws(model, **{**other, **change}) for name, change in CONTROLS.items()}

    def _draws(self, model: str, **other: Any) -> list[WhereTable]:
        judges = [other.get("judge", CLASSIFIER)]
        if judges == [SHUFFLED]:
            judges = sorted(
                {row["judge"] for row in self._tables.values() if (row["judge"] or "").startswith(SHUFFLED)}
            )
        tables = [self.of(model, **{**other, "judge": judge}) for judge in judges]
        return [draw for draw in tables if draw is not None]


def densities(row: TableRow) -> list[float]:
    """Share of the mask over share of the weights, seed by seed."""
    return [share / row["weights"] for share in row["mask"]]


def ratios(row: TableRow, control: TableRow, key: Measure, seeds: Sequence[Sequence[int]]) -> list[float]:
    """The row's share over its control's, of the seeds that both have.

    seeds: of the row and of the control. Over a control that holds nothing the ratio is infinite; where both hold
    nothing there is none.
    """
    shares = dict(zip(seeds[0], row[key], strict=True)), dict(zip(seeds[1], control[key], strict=True))
    pairs = [(shares[0][seed], shares[1][seed]) for seed in seeds[0] if seed in shares[1]]
    return [share / other if other else math.inf for share, other in pairs if share or other]


def regions_of(objective: WhereTable | None) -> dict[Region, TableRow]:
    """(role, third) → row of a table."""
    return {(row["role"], row["third"]): row for row in objective["rows"]} if objective else {}


def ratios_to_draws(
    objective: WhereTable, draws: Sequence[WhereTable], region: Region, key: Measure
) -> list[list[float]]:
    """``ratios`` of a region to every draw of a control."""
    row = regions_of(objective)[region]
    return [ratios(row, regions_of(draw)[region], key, (objective["seeds"], draw["seeds"])) for draw in draws]


def compared(objective: WhereTable, controls: Mapping[str, Sequence[WhereTable]]) -> list[list[str]]:
    """One line a role and third: shares, ratios to every control, and whether all ratios of all seeds and draws
    agree."""
    lines = []
    for (role, third), row in regions_of(objective).items():
        line = [role, third or "–", f"{100 * row['weights']:.1f}"]
        line += [spread(densities(row)), spread([100 * share for share in row["statistic"]], digits=1)]
        all_ratios: list[float] = []
        for draws in controls.values():
            for key in MEASURES:
                values = ratios_to_draws(objective, draws, (role, third), key)
                line.append(spread(*values) if draws else NOT_RUN)
                all_ratios += [value for draw in values for value in draw] if key == "mask" else []
        is_whole = all(controls.values()) and bool(all_ratios)
        above, below = is_whole and min(all_ratios) > 1, is_whole and max(all_ratios) < 1
        lines.append([*line, "more" if above else "less" if below else "–"])
    return lines


def main_table(tables: WhereTables, model: str) -> str:
    """What is ESI's and what is any gradient's, of one model."""
    objective = tables.of(model)
    if objective is None:
        return f"{NOT_RUN}\n"
    head = ["role", "third", "% of weights", "times chance", "statistic, %"]
    for name in CONTROLS:
        head += [f"mask ÷ {name}", f"statistic ÷ {name}"]
    return table([*head, "than every control"], compared(objective, tables.controls(model)))


def other_table(tables: WhereTables, model: str, others: Sequence[tuple[str, str]]) -> str:
    """Times chance by role and third of the other estimators and criteria, and the ratio to each on benign prompts."""
    columns = [(name, criterion, tables.of(model, estimator=name, criterion=criterion)) for name, criterion in others]
    regions = regions_of(tables.of(model))
    if not regions:
        return f"{NOT_RUN}\n"
    head, lines = ["role", "third"], [[role, third or "–"] for role, third in regions]
    for estimator, criterion, objective in columns:
        # A criterion against a control has been divided by one already, and no cell makes it of another.
        compared_with = () if criterion in AGAINST_CONTROL else ("benign prompts", "shuffled judge")
        head += [f"{criterion}, {estimator}", *(f"÷ {name}" for name in compared_with)]
        controls = tables.controls(model, estimator=estimator, criterion=criterion)
        for line, region in zip(lines, regions, strict=True):
            line.append(spread(densities(regions_of(objective)[region])) if objective else NOT_RUN)
            for name in compared_with:
                draws = controls[name] if objective else []
                line.append(
                    spread(*ratios_to_draws(objective, draws, region, "mask")) if objective and draws else NOT_RUN
                )
    return table(head, lines)


def draws_table(tables: WhereTables, model: str) -> str:
    """Share of ESI's mask over that of every draw of the shuffled judge, by third; the draws' own times chance."""
    objective, draws = tables.of(model), tables.controls(model)["shuffled judge"]
    if objective is None or not draws:
        return f"{NOT_RUN}\n"
    lines = []
    for draw in draws:
        line = [(draw["judge"] or "").removeprefix(SHUFFLED).lstrip("-") or "0", ", ".join(map(str, draw["seeds"]))]
        for third in THIRDS:
            region = (ALL_ROLES, third)
            line += [
                spread(densities(regions_of(draw)[region])),
                spread(*ratios_to_draws(objective, [draw], region, "mask")),
            ]
        lines.append(line)
    return table(["draw", "seeds", *(f"{third}{what}" for third in THIRDS for what in ("", ", ESI ÷ it"))], lines)


def where_section(data: Mapping[str, Any]) -> list[str]:
    """Tables of both models, and overlaps."""
    tables, parts = WhereTables(data), ["## Where the weights lie\n"]
    parts.append(
        "ESI (soft) on AdvBench by the classifier. Times chance: share of the mask over share of the scored weights. "
        "Statistic: the paper's, mean |g|·σ of a matrix, summed over matrices, as a share of its sum. Ratios are to "
        "the control's share, seed by seed: the mean over seeds [least, greatest]. Last column: whether every ratio of "
        "the masks, of every control, seed and draw, is above or below 1. If the shuffled judge has several draws, its "
        "ratio is the mean of their means. Draw 0's head began as the classifier's, the others' did not.\n"
    )
    others = [
        ("soft", "grad"),
        ("soft", "snip"),
        *(("soft", criterion) for criterion in AGAINST_CONTROL),
        ("gumbel-16", "esi"),
        ("paper-code", "esi"),
    ]
    for model in data["models"]:
        parts += [f"### {model}\n", main_table(tables, model)]
        parts += ["Draw by draw of the shuffled judge, all roles.\n", draws_table(tables, model)]
        parts += ["The other estimators and criteria.\n", other_table(tables, model, others)]
    parts += ["### Figures\n", "![by layer](real-layers.png)\n"]
    parts += ["Share of ESI's mask over the control's, the mean over the seeds that both have, and over draws.\n"]
    parts += ["![controls](real-controls.png)\n"]
    parts.append("### Overlaps of masks\n")
    parts.append("Weights in both masks over those of the smaller: mean over pairs of masks, least and greatest.\n")
    lines = []
    for row in data["overlaps"]:
        shares = [f"{100 * row[key]:.1f}" if key in row else NOT_RUN for key in ("mean", "least", "greatest")]
        lines.append([row["what"], row["model"], *shares, str(row["pairs"])])
    parts.append(table(["masks", "model", "%", "least", "greatest", "pairs"], lines))
    parts += ["### Responses that were scored\n"]
    keys = ("prompts used", "judged unsafe", "refused (by words)")
    answers = [
        [row["model"], row["prompts"], str(row["seed"]), *(str(row[key]) for key in keys)] for row in data["responses"]
    ]
    parts.append(table(["model", "prompts", "seed", *keys], answers) if answers else f"{NOT_RUN}\n")
    return parts


def mean_of(seeds: ArrayLike) -> list[float]:
    """The mean over seeds, layer by layer."""
    return [float(value) for value in np.mean(np.asarray(seeds), axis=0)]


def ratios_of_roles(objective: WhereTable, control: WhereTable) -> dict[str, list[float]]:
    """Role → share of the mask over the control's, by layer: the mean over the seeds that both have. NaN where the
    control holds nothing for one of them."""
    both = [seed for seed in objective["seeds"] if seed in control["seeds"]]
    ratio = {}
    for role in set(objective["roles"]) & set(control["roles"]):
        shares, others = (
            np.array([row["roles"][role][row["seeds"].index(seed)] for seed in both]) for row in (objective, control)
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio[role] = mean_of(np.where(others > 0, shares / others, np.nan))
    return {role: ratio[role] for role in objective["roles"] if role in ratio}


def where_figures(data: Mapping[str, Any]) -> dict[str, Any]:
    """File name → figure."""
    tables = WhereTables(data)
    curves: dict[str, dict[str, list[float]]] = {}
    for model in data["models"]:
        objective = tables.of(model)
        objectives = {"ESI": [objective] if objective is not None else [], **tables.controls(model)}
        shown = {name: draws for name, draws in objectives.items() if draws}
        curves[model] = {name: mean_of([mean_of(draw["layers"]) for draw in draws]) for name, draws in shown.items()}
    if not any(curves.values()):
        return {}
    drawn = {"real-layers.png": plots.layers(curves)}
    ratios_by_layer = {}
    for model in data["models"]:
        objective = tables.of(model)
        for name, draws in tables.controls(model).items():
            if objective is not None and draws:
                of_draws = [ratios_of_roles(objective, draw) for draw in draws]
                ratios_by_layer[model, name] = {role: mean_of([one[role] for one in of_draws]) for role in of_draws[0]}
    return {**drawn, "real-controls.png": plots.ratio_to_controls(ratios_by_layer)} if ratios_by_layer else drawn


# ---------------------------------------------------------------- the page


def head(data: Mapping[str, Any], meaning: str) -> list[str]:
    """What was run, and how. meaning: path of the page that says what it means."""
    states: dict[str, list[int]] = {}
    for row in data["cells"]:
        if "only_if" in row and row["state"] != "done":
            continue  # the finished cells may never ask for it
        counts = states.setdefault(row["cell"].split("/")[0], [0, 0, 0])
        counts[0] += row["state"] == "done"
        counts[1] += 1
        counts[2] += round(row.get("seconds", 0))
    about = data["provenance"]
    settings = ", ".join(f"{name} {value}" for name, value in data["settings"].items())
    versions = ", ".join(f"{name} {'/'.join(values)}" for name, values in about["versions"].items())
    lines = [[part, f"{done} of {total}", f"{seconds / 60:.0f}"] for part, (done, total, seconds) in states.items()]
    return [
        "# A real model: all figures\n",
        "Made by `make real-study` from [real.json](real.json), which has every cell with its command, seconds and "
        f"device; a cell that did not fit the hours is `not run` there. What it means: [results.md]({meaning}).\n",
        f"Settings: {settings}. Versions: {versions}; commits {', '.join(about['commits'])}.\n",
        table(["cells", "finished", "minutes"], lines),
    ]


def page(data: Mapping[str, Any], meaning: str = "../results.md") -> str:
    """The text of real.md."""
    tuned = [*tune_page.set_section(data), *tune_page.spa_section(data), *tune_page.noise_section(data)]
    agreement = tune_page.agreement_section(data)
    return "\n".join([*head(data, meaning), *where_section(data), *agreement, *tuned])


def write_pages(plan: Plan, cells: Sequence[Cell], docs: Path) -> None:
    """Write real.json, and from it real.md and the figures, into ``docs``."""
    docs.mkdir(parents=True, exist_ok=True)
    write_text_atomic(docs / "real.json", compact(collected(plan, cells)))
    data = json.loads((docs / "real.json").read_text(encoding="utf-8"))
    meaning = os.path.relpath(ROOT / "docs/results.md", docs)
    write_text_atomic(docs / "real.md", page(data, meaning))
    for name, figure in {**where_figures(data), **tune_page.figures(data)}.items():
        write_picture(docs / name, figure)

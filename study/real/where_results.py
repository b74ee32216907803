"""Where masks lie, and how much two masks overlap, from the finished ``where`` cells."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from typing_extensions import TypedDict

from esi_ds.data.rows import Row
from esi_ds.report.location import THIRDS, thirds_of
from esi_ds.report.tables import role_order
from study.real.grid import BENIGN, BENIGN_LOSS, CLASSIFIER, HARMFUL, SHUFFLED, Cell, shuffled_judge_name
from study.where import overlap, tables_of

LOSS = "loss"
ALL_ROLES = "all roles"
Units = list[dict[str, Any]]  # rows of report.json: units


class Shares(NamedTuple):
    """What a part of the model has of the whole. statistic: the paper's, the mean score of a matrix, summed over
    matrices."""

    mask: float
    weights: float
    statistic: float


class TableRow(TypedDict):
    """A role in a third of the depth; mask and statistic seed by seed."""

    role: str
    third: str | None  # None outside of the layers
    weights: float  # share of the scored weights
    mask: list[float]
    statistic: list[float]


class WhereTable(TypedDict):
    """Where the masks of one objective lie, in every seed."""

    model: str
    prompts: str
    judge: str | None  # None for a loss
    estimator: str
    count: int  # of prompts
    criterion: str
    seeds: list[int]
    layers: list[list[float]]  # times chance, by seed and layer
    roles: dict[str, list[list[float]]]  # the same of every role that all layers have
    rows: list[TableRow]


def masks_of(run: Path) -> dict[str, Units]:
    """Criterion → rows of the logical matrices, of every mask of a finished ESI run; ``LOSS``: of its control of benign
    rows, with what the control's own score |g|·σ selects and its mean."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    masks = {mask["selection"]["criterion"]: mask["units"] for mask in (report, *report.get("further_masks", []))}
    if "control_selected" in report["units"][0]:
        masks[LOSS] = [
            {**unit, "selected": unit["control_selected"], "mean_score": unit["control_mean_score"]}
            for unit in report["units"]
        ]
    return masks


def by_place(units: Units, keys: Sequence[str]) -> dict[tuple, Shares]:
    """Values of ``keys`` → what the matrices that have them hold."""
    mask, weights = tables_of(units, keys)
    total = sum(unit["mean_score"] for unit in units)
    statistic = dict.fromkeys(mask, 0.0)
    for unit in units:
        statistic[tuple(unit[key] for key in keys)] += unit["mean_score"] / total
    return {place: Shares(mask[place], weights[place], statistic[place]) for place in mask}


def with_thirds(units: Units) -> Units:
    """The rows with the third of the depth that their layer lies in; None outside of the layers, as for the head."""
    third = thirds_of(sorted({unit["layer"] for unit in units if unit["layer"] is not None}))
    return [{**unit, "third": third.get(unit["layer"])} for unit in units]


def in_order_of_the_model(place: tuple[str, str | None]) -> tuple:
    """The key that sorts roles and thirds as a model has them; what is outside of the layers stands behind them."""
    role, third = place
    return role == ALL_ROLES, role_order(role), THIRDS.index(third) if third in THIRDS else len(THIRDS)


def table_rows(masks: Sequence[Units]) -> Iterator[TableRow]:
    """Every role in every third; the last rows are of all roles together."""
    places = []
    for units in masks:
        units = with_thirds(units)
        whole = {(ALL_ROLES, third): shares for (third,), shares in by_place(units, ("third",)).items()}
        places.append(by_place(units, ("role", "third")) | whole)
    for role, third in sorted(places[0], key=in_order_of_the_model):
        shares = [seed[role, third] for seed in places]
        yield {
            "role": role,
            "third": third,
            "weights": round(shares[0].weights, 5),
            "mask": [round(share.mask, 5) for share in shares],
            "statistic": [round(share.statistic, 5) for share in shares],
        }


def by_layer(masks: Sequence[Units]) -> list[list[float]]:
    """Share of the mask over share of the scored weights, by seed and layer."""
    places = [by_place(units, ("layer",)) for units in masks]
    layers = sorted(layer for (layer,) in places[0] if layer is not None)
    return [[density(seed, (layer,)) for layer in layers] for seed in places]


def by_role_and_layer(masks: Sequence[Units]) -> dict[str, list[list[float]]]:
    """Role → share of the mask over share of the scored weights, by seed and layer; roles that every layer has."""
    places = [by_place(units, ("role", "layer")) for units in masks]
    layers = sorted({layer for _, layer in places[0] if layer is not None})
    roles = sorted({role for role, layer in places[0] if layer is not None}, key=role_order)
    everywhere = [role for role in roles if all((role, layer) in places[0] for layer in layers)]
    return {role: [[density(seed, (role, layer)) for layer in layers] for seed in places] for role in everywhere}


def density(places: Mapping[tuple, Shares], place: tuple) -> float:
    """Share of the mask over share of the scored weights."""
    return round(places[place].mask / places[place].weights, 3)


def where_tables(cells: Sequence[Cell], output: Path) -> list[WhereTable]:
    """One table for everything that is scored: model, prompts, judge, estimator and criterion; its seeds in order.

    cells: finished ones, of a seed's number of prompts or another.
    """
    groups: dict[tuple, list[tuple[int, Units]]] = {}
    for cell in cells:
        facts = cell.facts
        key = tuple(facts[name] for name in ("model", "prompts", "judge", "estimator", "count"))
        for criterion, units in masks_of(output / cell.name / "esi").items():
            loss = (facts["model"], BENIGN_LOSS, None, LOSS, facts["count"], LOSS)
            group = loss if criterion == LOSS else (*key, criterion)
            groups.setdefault(group, []).append((facts["seed"], units))
    tables = list[WhereTable]()
    for (model, prompts, judge, estimator, count, criterion), seeds in groups.items():
        seeds.sort(key=lambda pair: pair[0])
        masks = [units for _, units in seeds]
        tables.append(
            {
                "model": model,
                "prompts": prompts,
                "judge": judge,
                "estimator": estimator,
                "count": count,
                "criterion": criterion,
                "seeds": [seed for seed, _ in seeds],
                "layers": by_layer(masks),
                "roles": by_role_and_layer(masks),
                "rows": list(table_rows(masks)),
            }
        )
    return tables


# ---------------------------------------------------------------- overlaps


class Masks:
    """The masks of finished cells by what they are of; ``main``: the main estimator."""

    def __init__(self, cells: Sequence[Cell], output: Path, main: str, prompts: int):
        self.main, self.prompts = main, prompts
        self._folders: dict[tuple, Path] = {}
        for cell in cells:
            facts = cell.facts
            key = tuple(facts[name] for name in ("model", "prompts", "seed", "judge", "estimator", "count"))
            self._folders[key] = output / cell.name / "esi/mask"

    def of(self, model: str, seed: int, criterion: str = "esi", **other: Any) -> Path:
        """The mask's folder, which need not be there; ``other`` replaces prompts, judge, estimator or count."""
        usual = {"prompts": HARMFUL, "judge": CLASSIFIER, "estimator": self.main, "count": self.prompts}
        facts = {**usual, **other}
        key = (model, facts["prompts"], seed, facts["judge"], facts["estimator"], facts["count"])
        return self._folders.get(key, Path("/nonexistent")) / criterion


def overlap_rows(
    masks: Masks,
    models: Sequence[str],
    seeds: Sequence[int],
    where: Mapping[str, Any],
    larger_parts: Mapping[int, Sequence[int]],
) -> list[Row]:
    """Overlaps of two masks, the weights in both over those of the smaller: the mean over pairs, least and greatest;
    without them where no pair of masks was made.

    where: other_prompts, other_judges, shuffled_draws, estimators and counts of the grid. larger_parts: of the plan.
    """
    rows, draws = list[Row](), [shuffled_judge_name(draw) for draw in range(where["shuffled_draws"])]

    def add(what: str, model: str, pairs: Iterable[tuple[Path, Path]]) -> None:
        values = [value for pair in pairs if (value := overlap(*pair)) is not None]
        row: Row = {"what": what, "model": model, "pairs": len(values)}
        if values:
            shares = {"mean": float(np.mean(values)), "least": min(values), "greatest": max(values)}
            row |= {name: round(value, 4) for name, value in shares.items()}
        rows.append(row)

    def beside(what: str, model: str, **other: Any) -> None:
        """The usual mask against another one of the same seed."""
        add(what, model, [(masks.of(model, seed), masks.of(model, seed, **other)) for seed in seeds])

    def of_seeds(what: str, model: str, criterion: str = "esi", **other: Any) -> None:
        """The same mask of every two seeds."""
        add(what, model, combinations([masks.of(model, seed, criterion, **other) for seed in seeds], 2))

    for model in models:
        for criterion in ("esi", "grad", "snip"):
            of_seeds(f"{criterion}: other {masks.prompts} prompts", model, criterion)
        # How steady the controls' masks are: what an overlap of ESI's with itself has to be held against.
        of_seeds(f"benign prompts: other {masks.prompts} prompts", model, prompts=BENIGN)
        of_seeds(f"{SHUFFLED}: other {masks.prompts} prompts", model, judge=SHUFFLED)
        of_draws = [masks.of(model, seeds[0], judge=judge) for judge in draws]
        add(f"{SHUFFLED}: other draws", model, combinations(of_draws, 2))
        for name in (*where["other_prompts"], BENIGN):
            beside(f"esi: {name} prompts", model, prompts=name)
        for judge in (*where["other_judges"], *draws):
            beside(f"esi: {judge}", model, judge=judge)
        for estimator in list(where["estimators"])[1:]:
            beside(f"esi: {estimator}", model, estimator=estimator)
        for criterion in ("grad", "snip", *where["against_control"]):
            beside(f"{criterion} against esi", model, criterion=criterion)
        for count in (number for number in where["counts"] if number < masks.prompts):
            beside(f"esi: {count} of the prompts", model, count=count)
            of_seeds(f"esi: other {count} prompts", model, count=count)
        for count, seeds_of_parts in larger_parts.items():
            # The first part of a larger number holds the prompts of the first seed.
            add(f"esi: {count} prompts", model, [(masks.of(model, seeds[0]), masks.of(model, seeds[0], count=count))])
            if len(seeds_of_parts) > 1:
                of_seeds(f"esi: other {count} prompts", model, count=count)
    both = [(masks.of(models[0], seed), masks.of(models[1], seed)) for seed in seeds]
    add("esi: aligned against untouched", "both", both)
    return rows


def judged(cells: Sequence[Cell], output: Path) -> list[Row]:
    """Of every set of responses: how many were scored, judged unsafe and refused, as the run's report says."""
    rows = []
    for cell in cells:
        if not cell.after:  # it has answered itself
            facts = json.loads((output / cell.name / "esi/report.json").read_text(encoding="utf-8"))["facts"]
            keys = ("prompts used", "judged unsafe", "refused (by words)")
            about = {name: cell.facts[name] for name in ("model", "prompts", "seed")}
            rows.append({**about, **{key: facts.get(key) for key in keys}})
    return rows

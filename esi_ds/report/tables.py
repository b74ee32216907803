"""Tables of a report: pure functions of its ``units``, one row per logical matrix."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from esi_ds.models.roles import SCORED
from esi_ds.report.contents import EsiReport, MaskReport, Overlap, RoutingRow, UnitRow

Key = TypeVar("Key")
RowLabel = TypeVar("RowLabel", str, int)
ColumnLabel = TypeVar("ColumnLabel", str, int)


@dataclass(frozen=True)
class Heatmap:
    """A matrix with labels; NaN where there is no such cell. unit: of its values."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    unit: str
    row_axis: str
    column_axis: str
    is_ratio: bool = False  # 1 is the middle, and half is as far from it as double


@dataclass
class Cell:
    """Sums over some logical matrices."""

    selected: int = 0
    numel: int = 0
    score: float = 0.0
    statistic: float = 0.0  # the matrices' mean scores, added up; for ESI the paper's statistic (docs/method.md §6)
    control_selected: int = 0
    control_statistic: float = 0.0

    def add(self, unit: UnitRow) -> None:
        self.selected += unit["selected"]
        self.numel += unit["numel"]
        self.score += unit["mean_score"] * unit["numel"]
        self.statistic += unit["mean_score"]
        self.control_selected += unit.get("control_selected", 0)
        self.control_statistic += unit.get("control_mean_score", 0.0)

    @property
    def mean_score(self) -> float:
        """Over all weights of the cell."""
        return self.score / self.numel


def masks_of(report: EsiReport) -> list[MaskReport]:
    """All masks of an ESI run, in the order of its criteria."""
    return [report, *report.get("further_masks", [])]


def overlap(
    names: tuple[str, str], sizes: tuple[int, int], both: int, scored: int, same_weights: bool = True
) -> Overlap:
    """How much two masks have in common. sizes: weights of each. both: weights in both. scored: of the model."""
    first, second = sizes
    return {
        "first": names[0],
        "second": names[1],
        "both": both,
        "chance": second / scored,
        "jaccard": both / max(first + second - both, 1),
        "same_weights": same_weights,
        "of_first": both / max(first, 1),
        "of_second": both / max(second, 1),
    }


def grouped(units: Iterable[UnitRow], key_of: Callable[[UnitRow], Key | None]) -> dict[Key, Cell]:
    """Cells by key; rows whose key is None are left out."""
    cells: dict[Key, Cell] = defaultdict(Cell)
    for unit in units:
        if (key := key_of(unit)) is not None:
            cells[key].add(unit)
    return cells


def expert_of(unit: UnitRow) -> tuple[int, int] | None:
    """(layer, expert); None for a matrix that is not part of a routed expert. Every routed expert lies in a layer."""
    layer, expert = unit["layer"], unit["expert"]
    return None if layer is None or expert is None else (layer, expert)


def role_of(unit: UnitRow) -> tuple[int, str] | None:
    """(layer, role); None outside the layers."""
    return None if unit["layer"] is None else (unit["layer"], unit["role"])


def role_order(role: str) -> tuple[int, str]:
    """A key that sorts roles as ``SCORED`` has them, unknown ones last."""
    return (SCORED.index(role) if role in SCORED else len(SCORED), role)


@dataclass(frozen=True)
class View:
    """One heatmap of several over the same cells; the fields are those of ``Heatmap``. value: of a cell."""

    title: str
    unit: str
    value: Callable[[Cell], float]
    is_ratio: bool = False


def heatmaps(
    cells: Mapping[tuple[RowLabel, ColumnLabel], Cell],
    rows: Sequence[RowLabel],
    columns: Sequence[ColumnLabel],
    views: Sequence[View],
    axes: tuple[str, str],
) -> list[Heatmap]:
    """A heatmap for every view. axes: what rows and columns are."""
    return [
        Heatmap(
            view.title,
            [str(row) for row in rows],
            [str(column) for column in columns],
            [[view.value(cells[r, c]) if (r, c) in cells else math.nan for c in columns] for r in rows],
            view.unit,
            *axes,
            view.is_ratio,
        )
        for view in views
    ]


def _mask_heatmaps(
    cells: Mapping[tuple[int, ColumnLabel], Cell], columns: Sequence[ColumnLabel], k: int, axis: str
) -> list[Heatmap]:
    """Three views of cells keyed (layer, column): share of the mask, selected share of the cell, mean score."""
    layers = sorted({layer for layer, _ in cells})
    grouping = f"layer by {axis}"
    views = [
        View(f"Where the mask is: {grouping}", "% of the mask", lambda cell: 100 * cell.selected / max(k, 1)),
        View(f"How dense it is: {grouping}", "% of the cell's weights", lambda cell: 100 * cell.selected / cell.numel),
        View(f"Mean score: {grouping}", "mean score", lambda cell: cell.mean_score),
    ]
    return heatmaps(cells, layers, columns, views, ("layer", axis)) if cells else []


def layer_by_role(units: Sequence[UnitRow], k: int) -> list[Heatmap]:
    """Share of the mask of ``k`` weights, density and mean score by layer and role."""
    cells = grouped(units, role_of)
    columns = sorted({role for _, role in cells}, key=role_order)
    return _mask_heatmaps(cells, columns, k, "role")


def layer_by_expert(units: Sequence[UnitRow], k: int) -> list[Heatmap]:
    """The same by layer and expert, its gate, up and down matrices together; empty for a dense model."""
    cells = grouped(units, expert_of)
    columns = sorted({expert for _, expert in cells})
    return _mask_heatmaps(cells, columns, k, "expert")


def routing_maps(rows: Sequence[RoutingRow]) -> list[Heatmap]:
    """How each layer distributes tokens over its experts, one map per set of prompts."""
    maps = []
    for name in dict.fromkeys(row["set"] for row in rows):
        layer_rows = [row for row in rows if row["set"] == name]
        shares = [[100 * count / max(sum(row["tokens"]), 1) for count in row["tokens"]] for row in layer_rows]
        layers = [str(row["layer"]) for row in layer_rows]
        experts = [str(expert) for expert in range(len(layer_rows[0]["tokens"]))]
        title = f"Where routers send {name} prompts"
        maps.append(Heatmap(title, layers, experts, shares, "% of the layer's choices", "layer", "expert"))
    return maps


def by_role(units: Sequence[UnitRow]) -> list[tuple[str, Cell]]:
    """(role, its matrices together), in the order of ``SCORED``."""
    return sorted(grouped(units, lambda unit: unit["role"]).items(), key=lambda item: role_order(item[0]))


def top_matrices(units: Sequence[UnitRow], count: int = 20) -> list[UnitRow]:
    """The matrices with the most selected weights; ties by density, then by the model's order."""
    touched = [unit for unit in units if unit["selected"]]
    return sorted(touched, key=lambda unit: (-unit["selected"], -unit["selected"] / unit["numel"]))[:count]

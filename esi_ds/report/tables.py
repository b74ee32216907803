"""Tables of a report: pure functions of its ``units``, one row a logical matrix."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from esi_ds.models.roles import SCORED

Row = dict[str, Any]


@dataclass(frozen=True)
class Heatmap:
    """A labelled matrix; NaN where there is no such cell. ``unit`` says what its numbers are."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    unit: str
    row_axis: str
    column_axis: str


@dataclass
class Cell:
    """Sums over some logical matrices."""

    selected: int = 0
    numel: int = 0
    score: float = 0.0

    def add(self, unit: Row) -> None:
        self.selected += unit["selected"]
        self.numel += unit["numel"]
        self.score += unit["mean_score"] * unit["numel"]

    @property
    def mean_score(self) -> float:
        return self.score / self.numel


def grouped(units: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, Cell]:
    """Cells by key; rows whose key is None are left out."""
    cells: dict[Any, Cell] = defaultdict(Cell)
    for unit in units:
        if (found := key(unit)) is not None:
            cells[found].add(unit)
    return cells


def _role_order(role: str) -> tuple[int, str]:
    return (SCORED.index(role) if role in SCORED else len(SCORED), role)


def _heatmaps(
    cells: dict[tuple[int, Any], Cell], columns: Sequence[Any], k: int, what: str, axis: str
) -> list[Heatmap]:
    """Three views of cells keyed (layer, column): share of the mask, share of the cell, mean score."""
    layers = sorted({layer for layer, _ in cells})
    views = (
        (f"Where the mask is: {what}", "% of the mask", lambda cell: 100 * cell.selected / max(k, 1)),
        (f"How dense it is there: {what}", "% of the cell's weights", lambda cell: 100 * cell.selected / cell.numel),
        (f"Mean score: {what}", "mean score", lambda cell: cell.mean_score),
    )
    return [
        Heatmap(
            title,
            [str(layer) for layer in layers],
            [str(column) for column in columns],
            [[value(cells[layer, c]) if (layer, c) in cells else math.nan for c in columns] for layer in layers],
            unit,
            "layer",
            axis,
        )
        for title, unit, value in views
    ]


def layer_by_role(units: Sequence[Row], k: int) -> list[Heatmap]:
    cells = grouped(units, lambda unit: None if unit["layer"] is None else (unit["layer"], unit["role"]))
    columns = sorted({role for _, role in cells}, key=_role_order)
    return _heatmaps(cells, columns, k, "layer by role", "role") if cells else []


def layer_by_expert(units: Sequence[Row], k: int) -> list[Heatmap]:
    """Gate, up and down of an expert together; empty for a dense model."""
    cells = grouped(units, lambda unit: None if unit["expert"] is None else (unit["layer"], unit["expert"]))
    columns = sorted({expert for _, expert in cells})
    return _heatmaps(cells, columns, k, "layer by expert", "expert") if cells else []


def routing_maps(rows: Sequence[Row]) -> list[Heatmap]:
    """Of each set of prompts, how a layer's tokens are shared out among its experts; rows of ``report.json``'s
    ``routing``."""
    found = []
    for name in dict.fromkeys(row["set"] for row in rows):
        own = [row for row in rows if row["set"] == name]
        shares = [[100 * count / max(sum(row["tokens"]), 1) for count in row["tokens"]] for row in own]
        layers, experts = [str(row["layer"]) for row in own], [str(e) for e in range(len(own[0]["tokens"]))]
        title = f"Where routers send {name} prompts"
        found.append(Heatmap(title, layers, experts, shares, "% of the layer's choices", "layer", "expert"))
    return found


def by_role(units: Sequence[Row]) -> list[tuple[str, Cell]]:
    return sorted(grouped(units, lambda unit: unit["role"]).items(), key=lambda item: _role_order(item[0]))


def top_matrices(units: Sequence[Row], count: int = 20) -> list[Row]:
    """The matrices with the most selected weights; ties by density, then by the model's order."""
    chosen = [unit for unit in units if unit["selected"]]
    return sorted(chosen, key=lambda unit: (-unit["selected"], -unit["selected"] / unit["numel"]))[:count]

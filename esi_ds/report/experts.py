"""How a mask lies among the experts of a mixture: pure functions of a report's ``units``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from esi_ds.report.tables import Cell, Row, grouped

PARTS = {"expert": "routed experts", "shared": "shared experts", "attention": "attention", "mlp": "dense MLPs"}


def expert_tables(units: Sequence[Row], k: int) -> Row | None:
    """None for a dense model; else ``parts`` (routed experts, shared ones, attention, ...), ``experts`` (one row each),
    ``layers``, and over all routed experts: ``gini`` of their selected weights, ``hold_half``, the least number of
    experts that together hold half of what routed experts hold."""
    cells = grouped(units, lambda unit: None if unit["expert"] is None else (unit["layer"], unit["expert"]))
    if not cells:
        return None
    whole = sum(unit["numel"] for unit in units)
    selected = [cell.selected for cell in cells.values()]
    parts = grouped(units, lambda unit: PARTS.get(unit["role"].split(".")[0], "head and others"))
    layers = sorted({layer for layer, _ in cells})
    return {
        "num_experts": len(cells),
        "gini": gini(selected),
        "hold_half": hold_half(selected),
        "parts": [{"part": part, **_share(cell, k, whole)} for part, cell in sorted(parts.items())],
        "experts": [
            {"layer": layer, "expert": expert, **_share(cell, k, whole), "mean_score": cell.mean_score}
            for (layer, expert), cell in sorted(cells.items())
        ],
        "layers": [
            {"layer": layer, "gini": gini(own), "hold_half": hold_half(own), "experts": len(own), "selected": sum(own)}
            for layer in layers
            for own in [[cell.selected for (at, _), cell in cells.items() if at == layer]]
        ],
    }


def _share(cell: Cell, k: int, whole: int) -> dict[str, Any]:
    """share: of the mask; times_chance: that over the share of the scored weights."""
    share = cell.selected / max(k, 1)
    return {
        "selected": cell.selected,
        "numel": cell.numel,
        "share": share,
        "times_chance": share / (cell.numel / whole),
    }


def gini(counts: Sequence[int]) -> float:
    """Gini's coefficient: 0 where all hold alike, 1 − 1/n where one holds everything; 0 where nobody holds anything.

    Half the mean absolute difference of two of them over their mean (C. Gini, 1912).
    """
    total, n = sum(counts), len(counts)
    if total == 0:
        return 0.0
    weighted = sum(rank * count for rank, count in enumerate(sorted(counts), 1))
    return 2 * weighted / (n * total) - (n + 1) / n


def hold_half(counts: Sequence[int]) -> int:
    """The least number of counts that make half of all together; 0 where there is nothing."""
    total = sum(counts)
    running = accumulate(sorted(counts, reverse=True))
    return next((number for number, held in enumerate(running, 1) if 2 * held >= total), 0) if total else 0

"""How a mask is spread over the experts of a mixture: pure functions of a report's ``units``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from esi_ds.report.contents import ExpertTables, MaskShare, UnitRow
from esi_ds.report.location import part_of
from esi_ds.report.tables import Cell, expert_of, grouped


def expert_tables(units: Sequence[UnitRow], k: int) -> ExpertTables | None:
    """How a mask of ``k`` weights is spread over experts, layers and other parts; None for a dense model."""
    cells = grouped(units, expert_of)
    if not cells:
        return None
    whole = sum(unit["numel"] for unit in units)
    selected = [cell.selected for cell in cells.values()]
    parts = grouped(units, part_of)
    by_layer: dict[int, list[int]] = {}
    for (layer, _), cell in cells.items():
        by_layer.setdefault(layer, []).append(cell.selected)
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
            {
                "layer": layer,
                "gini": gini(counts),
                "hold_half": hold_half(counts),
                "experts": len(counts),
                "selected": sum(counts),
            }
            for layer, counts in sorted(by_layer.items())
        ],
    }


def _share(cell: Cell, k: int, whole: int) -> MaskShare:
    """A cell's part of the mask of ``k`` weights. whole: scored weights of the model."""
    share = cell.selected / max(k, 1)
    return {
        "selected": cell.selected,
        "numel": cell.numel,
        "share": share,
        "times_chance": share / (cell.numel / whole),
    }


def gini(counts: Sequence[int]) -> float:
    """Gini coefficient: 0 where all counts are equal, 1 − 1/n where one of n holds everything; 0 for all zeros.

    Half the mean absolute difference of two counts, over their mean (C. Gini, 1912).
    """
    total, n = sum(counts), len(counts)
    if total == 0:
        return 0.0
    weighted = sum(rank * count for rank, count in enumerate(sorted(counts), 1))
    return 2 * weighted / (n * total) - (n + 1) / n


def hold_half(counts: Sequence[int]) -> int:
    """The least number of counts that add up to half of the total; 0 where the total is 0."""
    total = sum(counts)
    running = accumulate(sorted(counts, reverse=True))
    return next((number for number, held in enumerate(running, 1) if 2 * held >= total), 0) if total else 0

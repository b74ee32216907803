"""All cells of the study, and the order in which they are run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from study.grid import with_needs
from study.real.grid import Cell, Plan, shuffled_cell
from study.real.tune_cells import TuneCells
from study.real.where_cells import WhereCells, shuffled_judge


def all_cells(plan: Plan, data: Path | None) -> list[Cell]:
    """Every cell, question by question, behind those that it needs. data: folder of the data sets."""
    options = ("--data", str(data.resolve())) if data is not None else ()
    judges = {shuffled_cell(judge): shuffled_judge(plan, judge, options) for judge in plan.shuffled_judges}
    where, tune = list[Cell](), TuneCells(plan)
    for cell in WhereCells(plan).cells():
        where += [judges.pop(need) for need in cell.after if need in judges]
        where.append(cell)
    return [
        *where,
        *tune.skill_cells(),
        *tune.set_cells(),
        *tune.noise_cells(),
        *tune.spa_masks(),
        *tune.spa_cells(),
        *tune.further_seeds(),
    ]


def in_running_order(cells: Sequence[Cell], first: Sequence[str]) -> list[Cell]:
    """The cells whose names start with one of ``first``, in its order, each behind those that it needs; then the others
    as they come."""
    ahead = {cell.name: cell for prefix in first for cell in with_needs(cells, [prefix])}
    return [*ahead.values(), *(cell for cell in cells if cell.name not in ahead)]

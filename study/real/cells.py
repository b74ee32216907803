"""All cells of the study in the order in which they are run."""

from __future__ import annotations

from pathlib import Path

from study.real.grid import Cell, Plan
from study.real.tune_cells import TuneCells
from study.real.where_cells import SHUFFLED_CELL, WhereCells, shuffled_judge


def all_cells(plan: Plan, data: Path | None) -> list[Cell]:
    """Every cell, behind those that it needs. data: folder of the data sets."""
    options = ("--data", str(data.resolve())) if data is not None else ()
    where, tune = list(WhereCells(plan).cells()), TuneCells(plan)
    first = next(index for index, cell in enumerate(where) if SHUFFLED_CELL in cell.after)
    return [
        *where[:first],
        shuffled_judge(plan, options),
        *where[first:],
        *tune.skill_cells(),
        *tune.set_cells(),
        *tune.noise_cells(),
        *tune.spa_masks(),
        *tune.spa_cells(),
        *tune.further_seeds(),
    ]

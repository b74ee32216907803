"""The study's figures from its run folders, complete or not: what ``docs/results/study.json`` holds."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from esi_ds.data.rows import Row
from study import findings, where
from study.collect import TUNED, finished, outside, provenance, row_of
from study.grid import MODELS, Cell, cells
from study.material import NUM_PROMPTS, ROOT

COMMAND = "python -m study.run"
KINDS = ("mask", "set", "lora", "spa", "perturb")


def summarise(output: Path) -> Row:
    """All figures; SystemExit where no cell is finished.

    facts (what was run), untuned (models before tuning, by name), set (methods: ``findings.methods``, against:
    ``findings.comparisons``), spa (settings: ``findings.preserved``, equal_task and tests: ``findings.at_equal_task``),
    masks (``where.places`` of each model), stability (``where.stability``), noise (``where.noise_curves`` by model).
    """
    grid = cells()
    rows = [row for cell in grid if cell.kind in TUNED and (row := row_of(cell, output))]
    if not rows:
        raise SystemExit(f"error: --runs = {output}: holds no finished cell; run python -m study.run first")
    set_rows, spa_rows = ([row for row in rows if (row["kind"] == "spa") == of_spa] for of_spa in (False, True))
    equal_task, spa_tests = findings.at_equal_task(spa_rows)
    curves = {f"{model}-aligned": where.noise_curves(output, f"{model}-aligned") for model in MODELS}
    return {
        "facts": facts(output, grid, rows),
        "untuned": untuned_models(curves),
        "set": {"methods": findings.methods(set_rows), "against": findings.comparisons(set_rows)},
        "spa": {"settings": findings.preserved(spa_rows), "equal_task": equal_task, "tests": spa_tests},
        "masks": [about for model in where.MODELS if (about := where.places(output, model))],
        "stability": where.stability(output),
        "noise": {model: points for model, points in curves.items() if points},
    }


def facts(output: Path, grid: Sequence[Cell], rows: Sequence[Row]) -> Row:
    """What was run, from the cells' own manifests and configs."""
    counts = finished(output, grid)
    return {
        "command": COMMAND,
        "finished": {kind: [counts.get(f"{kind} finished", 0), counts.get(kind, 0)] for kind in KINDS},
        "outside_the_grid": outside(output, grid),
        "seeds": findings.seeds_of(rows),
        "prompts_of_a_mask": NUM_PROMPTS,
        "prompts_count_once": True,  # in paired tests; figures that lack it were collected before they did
        "asked": {flag: sorted({len(row[flag]) for row in rows}) for flag in ("not_refused", "correct")},
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        **provenance(output, grid),
    }


def untuned_models(curves: Mapping[str, Sequence[Row]]) -> dict[str, Row]:
    """Attack success before tuning: of the perturb run's clean model (noise 0), else when the model was made."""
    figures = json.loads((ROOT / "examples/models/figures.json").read_text())["models"]
    untuned: dict[str, Row] = {}
    for name, row in figures.items():
        if "asr_string" in row.get("harmful", {}):
            judges = {"not_refused": row["harmful"]["asr_string"], "unsafe": row["harmful"]["asr_guard"]}
            measured = {flag: findings.counted(rate["count"], rate["n"]) for flag, rate in judges.items()}
            untuned[name] = {"source": "when the model was made: bf16, up to 64 tokens", **measured}
    for model, rows in curves.items():
        clean = {row["measure"]: row for row in rows if row["noise"] == 0 and row["rate"] is not None}
        if {"not refused", "unsafe"} <= set(clean):
            judges = {"not_refused": clean["not refused"], "unsafe": clean["unsafe"]}
            counts = {
                flag: (round(rate["rate"] * rate["n"]), rate["n"], rate["missing"]) for flag, rate in judges.items()
            }
            measured = {flag: findings.counted(*entries) for flag, entries in counts.items()}
            untuned[model] = {"source": "the perturb run's clean model", **measured}
    return untuned

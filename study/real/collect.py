"""real.json: figures of the finished cells, and which cells there are. One row a line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esi_ds.artifacts import read_manifest
from esi_ds.data.rows import Row
from study.real.grid import Cell, Folders, Plan
from study.real.runner import is_done, read_record
from study.real.tune_results import agreement_rows, base_rows, noise_rows, tuned_rows
from study.real.tune_tests import Flags, set_comparisons, spa_comparisons
from study.real.where_results import Masks, judged, overlap_rows, where_tables

LIBRARIES = ("python", "torch", "deepspeed", "transformers")


def shown_command(command: str, folders: Folders) -> str:
    """A command as a reader would give it: from the checkout, with names for the folders of data, models and cells."""
    words = shlex.split(command)
    words[0] = "python"
    words[1] = "/".join(Path(words[1]).parts[-2:]) if words[1].endswith(".py") else words[1]
    if "--data" in words:
        words[words.index("--data") + 1] = "DATA"
    text = shlex.join(words)
    return text.replace(str(folders.output), "OUTPUT").replace(str(folders.models), "MODELS")


def cell_row(cell: Cell, folders: Folders) -> Row:
    """A cell's state, seconds and commands."""
    output = folders.output
    record = read_record(output / cell.name)
    row: Row = {"cell": cell.name, "state": record.get("state", "not run")}
    if reason := cell.facts.get("only_if"):
        row["only_if"] = reason
    if row["state"] != "done":
        return row
    commands = [shown_command(step["command"], folders) for step in record["steps"].values()]
    return {**row, **{key: record[key] for key in ("seconds", "starts", "device")}, "commands": commands}


def provenance(cells: Sequence[Cell], output: Path) -> Row:
    """Versions, commits and world sizes of the finished cells, from their manifests."""
    manifests = [
        read_manifest(output / cell.name / step.stage)
        for cell in cells
        for step in cell.steps
        if step.config is not None
    ]
    return {
        "versions": {name: sorted({str(one["versions"].get(name)) for one in manifests}) for name in LIBRARIES},
        "commits": sorted({str(one.get("commit"))[:10] for one in manifests}),
        "world_sizes": sorted({one["world_size"] for one in manifests}),
        "threads": sorted({str(one.get("threads")) for one in manifests}),
    }


def collected(plan: Plan, cells: Sequence[Cell]) -> dict[str, Any]:
    """Everything that the page shows. Raises UserError for finished cells that were run with other settings."""
    output, size = plan.folders.output, plan.size
    done = [cell for cell in cells if is_done(cell, output)]
    where = [cell for cell in done if cell.part == "where"]
    masks = Masks(where, output, next(iter(plan.grid.where.estimators)), size.prompts)
    set_rows, spa_rows = (tuned_rows(done, output, part) for part in ("set", "spa"))
    bases = base_rows(done, output)
    aligned = next((row["loss"] for row in bases if row["model"] == plan.models[0]), None)
    spa_tests = spa_comparisons(spa_rows, aligned, Flags(done, output, "spa")) if aligned is not None else []
    against = {name: method.against for name, method in plan.grid.set.methods.items()}
    settings = {"device": plan.device, **size.model_dump(exclude={"minutes"})}
    return {
        "settings": settings,
        "models": list(plan.models),
        "provenance": provenance(done, output),
        "cells": [cell_row(cell, plan.folders) for cell in cells],
        "responses": judged(where, output),
        "where": where_tables([cell for cell in where if cell.facts["count"] == size.prompts], output),
        "overlaps": overlap_rows(masks, plan.models, size.seeds, plan.grid.where.model_dump(), plan.larger_parts()),
        "base": bases,
        "agreements": agreement_rows(done, output),
        "rates": {name: method.rates for name, method in plan.grid.set.methods.items()},
        "set": set_rows,
        "set_tests": set_comparisons(set_rows, Flags(done, output, "set"), size.seeds[0], against),
        "spa": spa_rows,
        "spa_tests": spa_tests,
        "noise": noise_rows(done, output),
    }


def compact(data: Mapping[str, Any]) -> str:
    """JSON in which every row of every table stands on a line of its own."""
    parts = []
    for name, value in data.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in value)
            parts.append(f"{json.dumps(name)}: [\n{lines}\n]")
        else:
            parts.append(f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"

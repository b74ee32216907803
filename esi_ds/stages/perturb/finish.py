"""What a perturbation leaves behind: curves of attack success against noise, and the proof that nothing stayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from esi_ds.eval.statistics import wilson
from esi_ds.report.html import write_report
from esi_ds.report.perturbation import closing_table, publish
from esi_ds.stages.evaluate.finish import facts, measures_of, tables
from esi_ds.stages.perturb.prepare import CLEAN, Cell, PerturbInputs
from esi_ds.stages.run import StageRun
from esi_ds.tracking import Tracker
from esi_ds.zero import runtime

Row = dict[str, Any]


def finish_perturb(
    run: StageRun[PerturbInputs],
    answers: Sequence[Row],
    verdicts: Mapping[tuple, Row],
    surprises: Mapping[tuple, Row],
    used: Mapping[str, str],
    restored: Row,
    tracker: Tracker,
) -> None:
    """Write the report and say how it went. Rank 0 writes; no collectives."""
    if not runtime.is_main():
        return
    inputs, folder = run.inputs, run.folder.path
    names = [CLEAN, *(cell.name for cell in inputs.cells)]
    measures = measures_of(run.config, inputs.eval, answers, verdicts, surprises)
    before = {name: None if name == CLEAN else CLEAN for name in names}
    found = tables(run.config, inputs.eval, measures, before)
    report = {
        "kind": "perturbation",
        "title": f"Noise on the weights of {run.config.model.path}",
        "models": [{"name": name, "before": before[name]} for name in names],
        "cells": [{"name": c.name, **asdict(c), "k": restored["cells"][c.name]} for c in inputs.cells],
        "mask": {"path": str(inputs.mask.path), "k": inputs.mask.k, "criterion": inputs.mask.metadata.get("criterion")},
        "restored": {"digest": restored["digest"], "checked": restored["checked"]},
        **found,
        "usage": dict(used),
        "curves": curves(found["measures"], inputs.cells),
        "facts": {
            **facts(run.config, runtime.world_size(), run.started),
            "fingerprint": run.fingerprint,
            "mask made from these weights": run.notes["mask_made_from_these_weights"],
            "weights' digest before and after every cell": restored["digest"],
        },
    }
    write_report(folder, report)
    publish(tracker, report)
    tracker.log(closing_table(report))
    tracker.log(f"report: {folder / 'report.html'}")


def curves(measures: Sequence[Row], cells: Sequence[Cell]) -> list[Row]:
    """One row a measure, set, judge, order, ratio and noise: the seeds' answers pooled, with a Wilson interval, and the
    seeds' own rates. The clean model is noise 0 of every order and ratio.

    The seeds share their prompts, so the interval speaks of the noise on these prompts.
    """
    by_cell = {(row["measure"], row["set"], row["judge"], row["model"]): row for row in measures}
    places = list(dict.fromkeys(key[:3] for key in by_cell))
    rows = []
    for place in places:
        for order, ratio in dict.fromkeys((cell.order, cell.ratio) for cell in cells):
            own = [cell for cell in cells if (cell.order, cell.ratio) == (order, ratio)]
            points = {0.0: [CLEAN]} | {c.noise: [d.name for d in own if d.noise == c.noise] for c in own}
            for noise, names in sorted(points.items()):
                found = [by_cell[(*place, name)] for name in names]
                pooled = wilson(sum(row["count"] for row in found), sum(row["n"] for row in found))
                rows.append(
                    {
                        **dict(zip(("measure", "set", "judge"), place, strict=True)),
                        "order": order,
                        "ratio": ratio,
                        "noise": noise,
                        **asdict(pooled),
                        "rate": pooled.rate,
                        "missing": sum(row["missing"] for row in found),
                        "by_seed": [row["rate"] for row in found],
                    }
                )
    return rows

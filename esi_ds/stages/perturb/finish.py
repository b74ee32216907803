"""What a perturbation leaves behind: curves of attack success against noise, and the proof that nothing stayed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from esi_ds.eval.rows import ChangeRow
from esi_ds.eval.tables import Measure
from esi_ds.report.contents import CurveRow, PerturbationReport
from esi_ds.report.evaluation import question_of
from esi_ds.report.perturbation import closing_table, publish
from esi_ds.report.sentences import mask_bits
from esi_ds.stages.evaluate.finish import facts, measures_of, rate_tables
from esi_ds.stages.evaluate.ledgers import EvalOutcome
from esi_ds.stages.perturb.prepare import CLEAN, NoiseCell, PerturbInputs
from esi_ds.stages.run import StageRun
from esi_ds.zero import runtime


@dataclass(frozen=True)
class RestoredCells:
    """What was disturbed, and the proof that it was restored."""

    digest: str  # sha256 of all weights, the same before the first cell and after every cell
    num_weights: dict[str, int]  # cell's name → weights disturbed
    num_checked: int  # cells after which the digest was compared


def finish_perturb(run: StageRun[PerturbInputs], outcome: EvalOutcome, restored: RestoredCells) -> None:
    """Write the report, publish it and print the closing table. Only rank 0 does anything; no collectives."""
    if not runtime.is_main():
        return
    inputs = run.inputs
    before = {name: None if name == CLEAN else CLEAN for name in inputs.names}
    measures = measures_of(inputs.eval, outcome, run.config.run.seed)
    tables = rate_tables(inputs.eval, measures, before, run.config.run.seed)
    report: PerturbationReport = {
        "kind": "perturbation",
        "title": f"Noise on the weights of {run.config.model.path}",
        "models": [{"name": name, "before": before[name]} for name in inputs.names],
        "cells": [
            {
                "name": cell.name,
                "order": cell.order,
                "ratio": cell.ratio,
                "noise": cell.noise,
                "seed": cell.seed,
                "k": restored.num_weights[cell.name],
            }
            for cell in inputs.cells
        ],
        "mask": {"path": str(inputs.mask.path), "k": inputs.mask.k, "criterion": inputs.mask.header.criterion},
        "restored": {"digest": restored.digest, "checked": restored.num_checked},
        **tables,
        "usage": outcome.usage,
        "curves": curves(measures, inputs.cells, tables["changes"]),
        "facts": {
            **facts(run, inputs.eval.section),
            "fingerprint": run.fingerprint,
            **mask_bits(inputs.mask),
            "mask made from these weights": run.notes["mask_made_from_these_weights"],
            "weights' digest before and after every cell": restored.digest,
        },
    }
    run.show(report, publish, closing_table)


def curves(measures: Sequence[Measure], cells: Sequence[NoiseCell], changes: Sequence[ChangeRow]) -> list[CurveRow]:
    """One row per measure, set, judge, order, ratio and noise, with the seeds' answers pooled into one interval.

    The clean model is noise 0 of every order and ratio. The seeds share their prompts, so the interval speaks of the
    noise on these prompts.

    changes: of every cell against the clean model.
    """
    p_values = {(*question_of(row), row["model"]): row["p_value"] for row in changes}
    by_model = {(*measure.topic, measure.model): measure for measure in measures}
    rows = []
    for measure, set_name, judge in dict.fromkeys(key[:3] for key in by_model):
        for order, ratio in dict.fromkeys((cell.order, cell.ratio) for cell in cells):
            names: dict[float, list[str]] = {0.0: [CLEAN]}
            curve = [cell for cell in cells if (cell.order, cell.ratio) == (order, ratio)]
            names |= {noise: [cell.name for cell in curve if cell.noise == noise] for noise in {c.noise for c in curve}}
            for noise in sorted(names):
                seeds = [by_model[measure, set_name, judge, name] for name in names[noise]]
                by_seed = [p_values.get((*seed.topic, seed.model)) for seed in seeds if noise]
                rows.append(_pooled(order, ratio, noise, seeds, by_seed))
    return rows


def _pooled(order: str, ratio: float, noise: float, seeds: Sequence[Measure], p_values: list[float | None]) -> CurveRow:
    """A point of a curve. seeds: what is counted of its cells, one per seed. p_values: of the seeds against noise 0."""
    measure, set_name, judge = seeds[0].topic
    whole = replace(
        seeds[0],
        flags=[flag for seed in seeds for flag in seed.flags],
        clusters=[(seed.model, key) for seed in seeds for key in seed.cluster_keys],
    )
    pooled = whole.as_row()
    return {
        "measure": measure,
        "set": set_name,
        "judge": judge,
        "order": order,
        "ratio": ratio,
        "noise": noise,
        "count": pooled["count"],
        "n": pooled["n"],
        "low": pooled["low"],
        "high": pooled["high"],
        "confidence": pooled["confidence"],
        "rate": pooled["rate"],
        "missing": pooled["missing"],
        "by_seed": [seed.as_row()["rate"] for seed in seeds],
        "p_values": p_values,
    }

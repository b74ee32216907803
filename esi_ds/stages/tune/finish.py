"""What a tuning run leaves behind: ``report.json``, ``report.html``, TensorBoard texts and the closing table."""

from __future__ import annotations

from esi_ds.artifacts import read_metrics
from esi_ds.data.thoughts import marks_with
from esi_ds.patch import PatchSummary
from esi_ds.report.card import METHODS
from esi_ds.report.contents import ChangedTensor, DriftRow, Facts, TunedAnswerRow, TuningReport
from esi_ds.report.sentences import mask_bits, routers_fate
from esi_ds.report.tuning import closing_table, publish, refusal_rows, samples
from esi_ds.stages.run import StageRun
from esi_ds.stages.tune.prepare import TuningInputs
from esi_ds.stages.tune.training import Training
from esi_ds.words import first_of
from esi_ds.zero import runtime


def finish_tuning(
    run: StageRun[TuningInputs],
    training: Training,
    patch: PatchSummary | None,
    answers: list[TunedAnswerRow],
    routing_drift: list[DriftRow],
) -> None:
    """Write the report, publish it and print the closing table. Only rank 0 does anything; no collectives.

    patch: its summary; None if none was written.
    """
    if not runtime.is_main():
        return
    inputs, folder = run.inputs, run.folder.path
    changed_tensors: dict[str, ChangedTensor] = {}
    if patch is not None:
        for name, row in patch["tensors"].items():
            changed_tensors[name] = {"changed": row["changed"], "numel": row["numel"]}
    report: TuningReport = {
        "kind": "tuning",
        "method": inputs.stage,
        "title": f"{METHODS[inputs.stage]} of {run.config.model.path}",
        "trained": inputs.trained.total,
        "total_numel": inputs.mask.total_numel,
        "steps": training.step,
        "changed": patch["changed"] if patch is not None else None,
        "changed_tensors": changed_tensors,
        "refusals": refusal_rows(answers, marks_with(run.config.model.thought_marks)),
        "samples": samples(answers),
        "routing_drift": routing_drift,
        "facts": facts(run, training),
        "progress": read_metrics(folder),
    }
    run.show(report, publish, closing_table)
    for partial in folder.glob("answers.*.partial.jsonl"):
        partial.unlink()


def facts(run: StageRun[TuningInputs], training: Training) -> Facts:
    """What the report's last table says of the run."""
    config, inputs = run.config, run.inputs
    tune, rows = inputs.tune, inputs.rows
    table = {
        "model": config.model.path,
        "model type": inputs.model_config.model_type,
        "dtype": config.model.dtype,
        **run.asked,
        "ranks": runtime.world_size(),
        "wall time (s)": round(run.wall_time_s, 1),
        "seed": config.run.seed,
        **run.remarks,
        "fingerprint": run.fingerprint,
        "mask": tune.mask,
        **mask_bits(inputs.mask),
        "mask fingerprint": inputs.mask.fingerprint,
        "mask made from these weights": run.notes["mask_made_from_these_weights"],
        "mask criterion": inputs.mask.header.criterion,
        **({"base weights": f"rounded from {line}"} if (line := run.rounded_from) else {}),
        "unscored parameters": tune.unscored,
        "routers": routers_fate(inputs.trained),
        **({"towers": "freeze"} if inputs.trained.towers else {}),
        "rows": f"{len(rows.sequences):,} of {tune.data.path} ({rows.columns})",
        **({"rows written": line} if (line := tune.data.how_written) else {}),
        "rows skipped": len(rows.skipped),
        "rows cut": rows.num_cut,
        **rows.facts("rows"),
        "rows read": training.position - training.num_benign,
        "learning rate": tune.lr,
        "schedule": f"{tune.scheduler}, warm-up {tune.warmup_ratio}",
        "clipping": tune.clip,
        "weight decay": tune.weight_decay,
        **run.versions,
    }
    if inputs.unanswered:
        not_asked = [f"{name} {index}: {reason}" for name, index, reason in inputs.unanswered]
        table["prompts not asked"] = first_of(not_asked, "; ")
    if inputs.benign is not None and tune.data.benign is not None:
        table["benign rows"] = f"{len(inputs.benign.sequences):,} of {tune.data.benign.path}"
        table["benign rows read"] = training.num_benign
        if line := tune.data.benign.how_written:
            table["benign rows written"] = line
        table |= inputs.benign.facts("benign rows")
    return table

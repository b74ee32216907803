"""What a tuning run leaves behind: ``report.json``, ``report.html``, TensorBoard texts and the closing table."""

from __future__ import annotations

import time
from collections.abc import Sequence

from esi_ds.artifacts import read_jsonl
from esi_ds.report.card import METHODS
from esi_ds.report.html import write_report
from esi_ds.stages.run import StageRun
from esi_ds.stages.tune.prepare import TuningInputs
from esi_ds.stages.tune.training import Training
from esi_ds.tracking import Tracker
from esi_ds.zero import runtime

NUM_SAMPLES = 4  # of each set
WHEN = ("before", "after")


def finish_tuning(
    run: StageRun[TuningInputs],
    training: Training,
    patch: dict | None,
    answers: list[dict],
    routing_drift: list[dict],
    tracker: Tracker,
) -> None:
    """Write the report and say how it went. Rank 0 writes; no collectives."""
    if not runtime.is_main():
        return
    folder = run.folder.path
    metrics = folder / "metrics.jsonl"
    report = {
        "kind": "tuning",
        "method": run.inputs.stage,
        "title": f"{METHODS[run.inputs.stage][0]} of {run.config.model.path}",
        "trained": run.inputs.trained.total,
        "total_numel": run.inputs.mask.total_numel,
        "steps": training.step,
        "changed": patch["changed"] if patch else None,
        "changed_tensors": {
            name: {"changed": row["changed"], "numel": row["numel"]}
            for name, row in (patch["tensors"] if patch else {}).items()
        },
        "refusals": refusal_rows(answers),
        "samples": samples(answers),
        "routing_drift": routing_drift,
        "facts": facts(run, training),
        "progress": read_jsonl(metrics) if metrics.is_file() else [],
    }
    write_report(folder, report)
    for partial in folder.glob("answers.*.partial.jsonl"):
        partial.unlink()
    for row in report["samples"]:
        said = [f"{when}: {row[when]}" for when in WHEN if when in row]
        quoted = "\n".join(f"    {line}" for line in "\n\n".join([row["prompt"], *said]).splitlines())
        tracker.text(f"answers/{row['set']}/{row['index']}", quoted)
    for row in report["refusals"]:  # two points of a curve over the steps
        for when, step in (("before", 0), ("after", training.step)):
            if (count := row[f"refused_{when}"]) is not None:
                tracker.points(step, {f"refused/{row['set']}/words": count / row["n"]})
    tracker.log(closing_table(report))
    tracker.log(f"report: {folder / 'report.html'}")


def samples(answers: Sequence[dict]) -> list[dict]:
    """The first few of every set."""
    sets = dict.fromkeys(row["set"] for row in answers)
    return [row for name in sets for row in [row for row in answers if row["set"] == name][:NUM_SAMPLES]]


def refusal_rows(answers: Sequence[dict]) -> list[dict]:
    """Counts by set of prompts; None where nothing was asked then. An empty answer is no refusal but counted apart."""
    rows = []
    for name in dict.fromkeys(row["set"] for row in answers):
        own = [row for row in answers if row["set"] == name]
        counts: dict[str, int | None] = {}
        for when in WHEN:
            asked = when in own[0]
            counts[f"refused_{when}"] = sum(row[f"refused_{when}"] for row in own) if asked else None
            counts[f"empty_{when}"] = sum(not row[when].strip() for row in own) if asked else None
        rows.append({"set": name, "n": len(own), **counts})
    return rows


def facts(run: StageRun[TuningInputs], training: Training) -> dict:
    """What the report's last table says of the run."""
    config, inputs, tune = run.config, run.inputs, run.config.tune
    found = {
        "model": config.model.path,
        "model type": inputs.model_config.model_type,
        "dtype": config.model.dtype,
        "ranks": runtime.world_size(),
        "wall time (s)": round(time.time() - run.started, 1),
        "seed": config.run.seed,
        "fingerprint": run.fingerprint,
        "mask": tune.mask,
        "mask fingerprint": inputs.mask.fingerprint,
        "mask made from these weights": run.notes["mask_made_from_these_weights"],
        "mask criterion": inputs.mask.metadata.get("criterion"),
        "unscored parameters": tune.unscored,
        "routers": tune.router or tune.unscored,
        "rows": f"{len(inputs.rows.sequences):,} of {tune.data.path} ({inputs.rows.columns})",
        "rows skipped": len(inputs.rows.skipped),
        "rows cut": inputs.rows.num_cut,
        "rows read": training.position,
        "learning rate": tune.lr,
        "schedule": f"{tune.scheduler}, warm-up {tune.warmup_ratio}",
        "clipping": tune.clip,
        "weight decay": tune.weight_decay,
    }
    if inputs.benign is not None:
        found["benign rows"] = f"{len(inputs.benign.sequences):,} of {tune.data.benign.path}"
    return found


def closing_table(report: dict) -> str:
    """What the console shows at the end."""
    lines = ["", f"{'steps':24}{report['steps']:>12,}"]
    lines.append(f"{'weights trained':24}{report['trained']:>12,} of {report['total_numel']:,}")
    if report["changed"] is not None:
        lines.append(f"{'weights that differ':24}{report['changed']:>12,}")
    if report["progress"]:
        first, last = report["progress"][0], report["progress"][-1]
        lines.append(f"{'loss, first and last':24}{first['loss'] or float('nan'):>12.4g}{last['loss'] or 0.0:>12.4g}")
    if report["refusals"]:
        lines += ["", f"{'refused (string match)':24}{'before':>12}{'after':>12}{'answers':>12}"]
        for row in report["refusals"]:
            shares = (row[f"refused_{when}"] for when in WHEN)
            cells = ("-" if share is None else f"{share / row['n']:.1%}" for share in shares)
            lines.append(f"{row['set']:24}" + "".join(f"{cell:>12}" for cell in cells) + f"{row['n']:>12,}")
    if report["routing_drift"]:
        lines += ["", f"{'tokens routed otherwise':24}{'share':>12}{'tokens':>12}"]
        for name in dict.fromkeys(row["set"] for row in report["routing_drift"]):
            own = [row for row in report["routing_drift"] if row["set"] == name]
            changed, tokens = (sum(row[key] for row in own) for key in ("changed", "tokens"))
            lines.append(f"{name:24}{changed / max(tokens, 1):>12.2%}{tokens:>12,}")
    return "\n".join(lines)

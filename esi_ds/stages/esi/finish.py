"""From scores to what stays: ``scores/``, ``mask/``, ``report.json``, ``report.html`` and the closing table."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from esi_ds.artifacts import read_jsonl
from esi_ds.config import Config
from esi_ds.core.mask import FORMAT
from esi_ds.core.select import key_to_score
from esi_ds.core.units import Parameter, Unit
from esi_ds.models.roles import layer_of
from esi_ds.report.experts import expert_tables
from esi_ds.report.html import write_report
from esi_ds.report.publish import closing_table, publish
from esi_ds.stages.esi.losses import LossRows
from esi_ds.stages.esi.prepare import Inputs, PreparedEsiJudge, clean, encode_prompts
from esi_ds.tracking import Tracker
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.files import write_mask, write_scores
from esi_ds.zero.gradients import GradientShards
from esi_ds.zero.routing import MAX_ROWS, frequencies, routing_choices
from esi_ds.zero.score import Accumulated, Scores, Selection, select_weights, silent_experts
from esi_ds.zero.statistics import log_histograms, unit_rows, unscored_numel

NUM_SAMPLES = 8


@dataclass(frozen=True)
class Outcome:
    """What the scoring pass leaves behind. scores, excluded: by prompt index."""

    gradients: GradientShards
    num_prompts: int
    inputs: Inputs
    responses: list[str]
    scores: dict[int, float]
    excluded: dict[int, str]
    special_tokens_broken_up: int
    sequences: list[list[int]]  # prompts and responses, as the model reads them


@dataclass(frozen=True)
class LossOutcome:
    """What the pass over one loss's rows leaves behind. values, excluded: by row of the file."""

    loss: LossRows
    accumulated: Accumulated
    num_rows: int
    values: dict[int, float]
    excluded: dict[int, str]

    @property
    def num_skipped(self) -> int:
        """Rows that could not be read as a conversation, and rows whose gradient was not finite."""
        return len(self.loss.rows.skipped) + len(self.excluded)


def finish(
    config: Config,
    folder: Path,
    model: ShardedModel,
    scores: Scores,
    sigma: dict[Unit, float],
    fingerprint: str,
    outcome: Outcome | None,
    losses: Sequence[LossOutcome],
    started: float,
    tracker: Tracker,
) -> None:
    """Select, write, report. Collectives: those of selection, of the two folders and of the statistics."""
    section = config.select
    selection = select_weights(
        model,
        scores,
        ratio=section.ratio,
        order=section.order,
        of=section.of,
        scope=section.scope,
        seed=config.run.seed,
    )
    scored = [parameter for parameter in model.parameters if parameter.scored]
    if selection.k == sum(parameter.numel for parameter in scored):
        tracker.log("select.ratio asks for as many weights as are scored or more: the mask holds all of them")
    metadata = mask_metadata(config, model, selection, fingerprint)
    if config.esi.save_scores:
        shown = {key: metadata[key] for key in ("criterion", "contrastive", "fingerprint", "total_numel")}
        write_scores(folder / "scores", scored, model.scored, scores, {"format": "esi-scores/1", **shown})
    write_mask(folder / "mask", scored, model.scored, selection.bits, metadata, units_json(scored))
    rows = unit_rows(model, scores, selection, sigma)
    warning = silent_experts(rows)
    if warning:
        tracker.log(warning)
    routing = routing_rows(config, model, outcome, losses)
    overall, by_role = log_histograms(model, scores)
    if not runtime.is_main():
        return
    report = {
        "title": title(config),
        "facts": run_facts(config, model, fingerprint, outcome, started) | ({"NOTE": warning} if warning else {}),
        "selection": selection_facts(config, model, selection, losses),
        "units": rows,
        "experts": expert_tables(rows, selection.k),
        "routing": routing,
        "score_histogram": overall,
        "score_histograms_by_role": by_role,
        **pass_facts(outcome),
        "losses": [loss_facts(found) for found in losses],
        "progress": read_jsonl(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else [],
    }
    write_report(folder, report)
    publish(tracker, report)
    tracker.log(closing_table(report))
    tracker.log(f"report: {folder / 'report.html'}")


def routing_rows(
    config: Config, model: ShardedModel, outcome: Outcome | None, losses: Sequence[LossOutcome]
) -> list[dict]:
    """{set, layer, tokens: one count an expert} of every router, on rank 0: how often harmful prompts with their
    responses, and benign rows, or else the prompts of ``eval.benign``, reach each expert. Collectives:
    ``routing_choices``, a set each.
    """
    sets = {"harmful": (outcome.sequences, outcome.inputs.tokenizer.pad_token_id)} if outcome is not None else {}
    for found in losses:
        if found.loss.name == "benign":
            sets["benign"] = ([sequence.ids for sequence in found.loss.rows.sequences], found.loss.pad)
    if "benign" not in sets and outcome is not None and outcome.inputs.benign_prompts:
        inputs = outcome.inputs
        texts, _ = clean(inputs, inputs.benign_prompts[:MAX_ROWS])
        sets["benign"] = (encode_prompts(inputs, config, texts), inputs.tokenizer.pad_token_id)
    experts = {unit.expert for parameter in model.parameters for unit in parameter.units if unit.expert is not None}
    made = []
    for name, (sequences, pad) in sets.items() if experts else ():
        choices = routing_choices(model, sequences, pad, config.esi.batch_size)
        for router, counts in frequencies(choices or {}, len(experts)).items():
            made.append({"set": name, "layer": layer_of(router), "tokens": counts})
    return made


def title(config: Config) -> str:
    section = config.select
    what = "Expected Safety Impact" if section.criterion == "esi" else f"{section.criterion} scores"
    return f"{what}{', contrastive,' if section.contrastive else ''} of {config.model.path}"


def units_json(scored: Sequence[Parameter]) -> list[dict]:
    """``mask/units.json``: which flat positions of which parameter are one logical matrix, and its role."""
    return [{"parameter": parameter.name, **asdict(unit)} for parameter in scored for unit in parameter.units]


def mask_metadata(config: Config, model: ShardedModel, selection: Selection, fingerprint: str) -> dict[str, str]:
    """The metadata of every file of ``mask/`` (docs/design.md §7); safetensors takes strings only."""
    section = config.select
    threshold = key_to_score(selection.cut, section.order) if selection.cut is not None else None
    return {
        "format": FORMAT,
        "k": str(selection.k),
        "ratio": repr(section.ratio),
        "total_numel": str(sum(parameter.numel for parameter in model.parameters)),
        "threshold": "null" if threshold is None else repr(threshold),
        "criterion": section.criterion,
        "contrastive": str(section.contrastive).lower(),
        "order": section.order,
        "of": section.of,
        "scope": section.scope,
        "seed": str(config.run.seed),
        "fingerprint": fingerprint,
        "shapes": json.dumps({p.name: p.shape for p in model.parameters if p.scored}),
        "offsets": json.dumps({p.name: p.offset for p in model.parameters if p.scored}),
        "counts": json.dumps(selection.counts),
    }


def selection_facts(
    config: Config, model: ShardedModel, selection: Selection, losses: Sequence[LossOutcome] = ()
) -> dict:
    section = config.select
    facts = {
        "k": selection.k,
        "total_numel": sum(p.numel for p in model.parameters),
        "scored_numel": sum(p.numel for p in model.parameters if p.scored),
        "threshold": key_to_score(selection.cut, section.order) if selection.cut is not None else None,
        "criterion": section.criterion,
        "contrastive": section.contrastive,
        "order": section.order,
        "ratio": section.ratio,
        "of": section.of,
        "scope": section.scope,
    }
    for found in losses:
        name = found.loss.name
        facts |= {
            f"{name} rows from": f"{found.loss.path} ({found.loss.rows.columns})",
            f"{name} rows used": found.num_rows,
            f"{name} rows skipped": found.num_skipped,
        }
    return facts


def loss_facts(found: LossOutcome) -> dict:
    """One loss's rows in full: mean loss of those used, and why the others were left out."""
    rows = found.loss.rows
    left_out = sorted([*rows.skipped, *found.excluded.items()])
    return {
        "name": found.loss.name,
        "path": found.loss.path,
        "columns": rows.columns,
        "sha256": rows.sha256,
        "num_rows": found.num_rows,
        "num_cut": rows.num_cut,
        "mean_loss": math.fsum(found.values.values()) / len(found.values),
        "skipped": [{"row": row, "reason": reason} for row, reason in left_out],
    }


def run_facts(config: Config, model: ShardedModel, fingerprint: str, outcome: Outcome | None, started: float) -> dict:
    """What the report's first table says of the run."""
    facts = {
        "model": config.model.path,
        "model type": model.module.config.model_type,
        "dtype": config.model.dtype,
        "ranks": runtime.world_size(),
        "wall time (s)": round(time.time() - started, 1),
        "seed": config.run.seed,
        "fingerprint": fingerprint,
        "unscored weights": ", ".join(f"{role} {n:,}" for role, n in unscored_numel(model.parameters).items()),
    }
    if outcome is not None:
        facts |= {
            **_judge_facts(config, outcome.inputs.judge),
            "estimator": config.esi.estimator,
            "prompts": len(outcome.inputs.prompts),
            "prompts used": outcome.num_prompts,
            "prompts from": str(outcome.inputs.source),
            "rows skipped in the file": len(outcome.inputs.skipped),
        }
    return facts


def _judge_facts(config: Config, judge: PreparedEsiJudge | None) -> dict[str, object]:
    section = config.judge
    if judge is None:
        return {"judge": f"scores given in {config.data.responses}"}
    context = "as its template says" if judge.labels else section.context.replace("_", " ")
    return {"judge": section.path, "judge family": judge.family.name, "judge score": f"{section.score} ({context})"}


def pass_facts(outcome: Outcome | None) -> dict:
    """Scores, exclusions and sample answers; empty for criteria without prompts."""
    if outcome is None:
        return {"judge_scores": [], "excluded": [], "special_tokens_broken_up": 0, "samples": []}
    prompts = outcome.inputs.prompts
    return {
        "judge_scores": [score for _, score in sorted(outcome.scores.items())],
        "excluded": [
            {"index": index, "prompt": prompts[index], "reason": reason}
            for index, reason in sorted(outcome.excluded.items())
        ],
        "special_tokens_broken_up": outcome.special_tokens_broken_up,
        "samples": [
            {
                "index": index,
                "prompt": prompts[index],
                "response": outcome.responses[index],
                "judge_score": outcome.scores[index],
            }
            for index in sorted(outcome.scores)[:NUM_SAMPLES]
        ],
    }

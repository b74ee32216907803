"""From gradients to the results of the run: ``scores/``, ``mask/``, ``report.json``, ``report.html``, closing table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from esi_ds.artifacts import read_metrics
from esi_ds.config import Config, EsiGuard
from esi_ds.data.chat import answerable
from esi_ds.data.turns import prompt_text
from esi_ds.eval.refusals import is_refusal
from esi_ds.models.folder import max_positions
from esi_ds.models.roles import layer_of
from esi_ds.report.contents import (
    EsiReport,
    ExcludedPrompt,
    Facts,
    LossReport,
    MaskReport,
    RoutingRow,
    SampleResponse,
)
from esi_ds.report.evaluation import percent
from esi_ds.report.publish import closing_table, publish
from esi_ds.report.sentences import listed
from esi_ds.stages.esi.losses import LossRows
from esi_ds.stages.esi.masks import SharedGradients, make_masks
from esi_ds.stages.esi.prepare import EsiInputs, Example, PreparedEsiJudge, PromptInputs, clean, encode_prompts
from esi_ds.stages.run import StageRun
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.routing import MAX_ROWS, frequencies, routing_choices
from esi_ds.zero.score import Accumulated, silent_experts
from esi_ds.zero.statistics import unscored_numel

ROUTED_ROWS = 8  # at a time, where `esi.batch_size` is auto
NUM_SAMPLES = 8


@dataclass(frozen=True)
class AnsweredPrompts:
    """The prompts of an objective with their responses, before its pass. excluded: prompt index → reason."""

    inputs: PromptInputs
    responses: list[str]
    examples: list[Example]
    excluded: dict[int, str]
    special_tokens_broken_up: int


@dataclass(frozen=True)
class PromptOutcome:
    """What the pass over prompts and responses leaves behind. scores, excluded: by prompt index."""

    accumulated: Accumulated
    inputs: PromptInputs
    responses: list[str]
    scores: dict[int, float]
    excluded: dict[int, str]
    special_tokens_broken_up: int
    sequences: list[list[int]]  # prompts with their responses, as the model reads them

    @property
    def name(self) -> str:
        """The objective's name: safety or control."""
        return self.inputs.name


@dataclass(frozen=True)
class LossOutcome:
    """What the pass over the rows of one loss leaves behind. values, excluded: by row of the file."""

    loss: LossRows
    accumulated: Accumulated
    num_rows: int
    values: dict[int, float]
    excluded: dict[int, str]

    @property
    def name(self) -> str:
        """The objective's name."""
        return self.loss.name

    @property
    def num_skipped(self) -> int:
        """Rows that could not be read as a conversation, and rows whose gradient was not finite."""
        return len(self.loss.rows.skipped) + len(self.excluded)


def finish_esi(
    run: StageRun[EsiInputs],
    model: ShardedModel,
    gradients: SharedGradients,
    scored: Sequence[PromptOutcome],
    losses: Sequence[LossOutcome],
) -> None:
    """Select, write, report. scored: of the objectives that are a judge's score.

    Collectives: those of ``make_masks``, and of the routing frequencies.
    """
    config = run.config
    by_name = {outcome.name: outcome for outcome in scored}
    outcome, control = by_name.get("safety"), by_name.get("control")
    facts = loss_facts(losses) | (control_facts(control) if control is not None else {})
    (first, *others), overlaps = make_masks(run, model, gradients, facts)
    routing = routing_rows(config, model, outcome, losses)
    is_list = isinstance(config.select.criterion, list)
    silent = {mask["selection"]["criterion"]: silent_experts(mask["units"]) for mask in (first, *others)}
    notes = {f"NOTE ({name})" if is_list else "NOTE": note for name, note in silent.items() if note}
    for label, note in notes.items():
        run.tracker.log(f"{label}: {note}" if is_list else note)
    if is_list:
        run.notes["masks"] = {mask["selection"]["criterion"]: mask_note(config, mask) for mask in (first, *others)}
    if not runtime.is_main():
        return
    report: EsiReport = {
        "title": title(config),
        "facts": run_facts(run, model, outcome) | run.remarks | notes,
        **first,
        "routing": routing,
        "judge_scores": [score for _, score in sorted(outcome.scores.items())] if outcome else [],
        "excluded": excluded_prompts(outcome) if outcome else [],
        "special_tokens_broken_up": outcome.special_tokens_broken_up if outcome else 0,
        "samples": samples(outcome) if outcome else [],
        "losses": [loss_report(loss) for loss in losses],
        "progress": read_metrics(run.folder.path),
    }
    if is_list:
        report |= {"further_masks": others, "overlaps": overlaps}
    run.show(report, publish, closing_table)


def mask_note(config: Config, mask: MaskReport) -> dict[str, Any]:
    """What the manifest says of one mask of several. Its path is within the run folder."""
    selection = mask["selection"]
    folder = f"mask/{selection['criterion']}"
    scores = f"scores/{selection['criterion']}" if config.esi.save_scores else None
    return {"path": folder, "scores": scores, "k": selection["k"], "threshold": selection["threshold"]}


def loss_facts(losses: Sequence[LossOutcome]) -> dict[str, object]:
    """Rows of the report's table: where the rows of each loss come from, and how many took part."""
    facts: dict[str, object] = {}
    for loss in losses:
        facts |= {
            f"{loss.name} rows from": f"{loss.loss.path} ({loss.loss.rows.columns})",
            f"{loss.name} rows used": loss.num_rows,
            f"{loss.name} rows skipped": loss.num_skipped,
            **loss.loss.rows.facts(f"{loss.name} rows"),
        }
    return facts


def control_facts(control: PromptOutcome) -> dict[str, object]:
    """The same of a control of prompts."""
    data = control.inputs.data
    return {
        "control prompts from": data.origin,
        "control prompts used": control.accumulated.count,
        "control prompts skipped": len(data.skipped) + len(control.excluded),
    }


def routing_rows(
    config: Config, model: ShardedModel, outcome: PromptOutcome | None, losses: Sequence[LossOutcome]
) -> list[RoutingRow]:
    """How often harmful prompts with their responses, and benign texts, reach each expert; on rank 0.

    Benign texts are the rows of ``data.benign``, else the prompts of ``eval.benign``. Empty for a dense model.
    Collectives: those of ``routing_choices``, once per set.
    """
    sets = {"harmful": (outcome.sequences, outcome.inputs.tokenizer.pad_token_id)} if outcome is not None else {}
    for loss in losses:
        if loss.name == "benign":
            sets["benign"] = ([sequence.ids for sequence in loss.loss.rows.sequences], loss.loss.pad)
    if "benign" not in sets and outcome is not None and outcome.inputs.benign_prompts:
        inputs = outcome.inputs
        texts, _ = clean(inputs, inputs.benign_prompts[:MAX_ROWS])
        encoded = dict(enumerate(encode_prompts(inputs, config, texts)))
        readable, _ = answerable(encoded, 0, max_positions(inputs.model_config))
        sets["benign"] = (list(readable.values()), inputs.tokenizer.pad_token_id)
    experts = {unit.expert for parameter in model.parameters for unit in parameter.units if unit.expert is not None}
    rows: list[RoutingRow] = []
    for name, (sequences, pad) in sets.items() if experts else ():
        at_once = ROUTED_ROWS if config.esi.batch_size == "auto" else config.esi.batch_size
        choices = routing_choices(model, sequences, pad, at_once)
        for router, counts in frequencies(choices or {}, len(experts)).items():
            rows.append({"set": name, "layer": layer_of(router), "tokens": counts})
    return rows


def title(config: Config) -> str:
    """The report's title."""
    names = listed(["Expected Safety Impact" if name == "esi" else name for name in config.select.criteria])
    scores = names if names == "Expected Safety Impact" else f"{names} scores"
    return f"{scores}{', contrastive,' if config.select.contrastive else ''} of {config.model.path}"


def loss_report(outcome: LossOutcome) -> LossReport:
    """One loss's rows in full: mean loss of those used, and why the others were left out."""
    rows = outcome.loss.rows
    left_out = sorted([*rows.skipped, *outcome.excluded.items()])
    return {
        "name": outcome.name,
        "path": outcome.loss.path,
        "columns": rows.columns,
        "sha256": rows.sha256,
        "num_rows": outcome.num_rows,
        "num_cut": rows.num_cut,
        "mean_loss": math.fsum(outcome.values.values()) / len(outcome.values),
        "skipped": [{"row": row, "reason": reason} for row, reason in left_out],
    }


def run_facts(run: StageRun[EsiInputs], model: ShardedModel, outcome: PromptOutcome | None) -> Facts:
    """What the report's first table says of the run."""
    config = run.config
    facts: Facts = {
        "model": config.model.path,
        "model type": model.module.config.model_type,
        "dtype": config.model.dtype,
        **run.asked,
        "ranks": runtime.world_size(),
        "wall time (s)": round(run.wall_time_s, 1),
        "seed": config.run.seed,
        "fingerprint": run.fingerprint,
        "unscored weights": ", ".join(f"{role} {n:,}" for role, n in unscored_numel(model.parameters).items()),
        "scores kept": config.esi.save_scores,
        **run.versions,
    }
    if outcome is not None:
        data = outcome.inputs.data
        facts |= {
            **_judge_facts(config, outcome.inputs.judge),
            "estimator": config.esi.estimator,
            "prompts": len(data.prompts),
            "prompts used": outcome.accumulated.count,
            "prompts from": data.origin,
            "rows skipped in the file": len(data.skipped),
            **({"responses": f"greedy, at most {config.esi.max_new_tokens} tokens"} if data.are_generated else {}),
            **response_facts(outcome),
        }
    return facts


def response_facts(outcome: PromptOutcome) -> Facts:
    """How many of the responses used are unsafe to the judge, where its score says so, and how many hold a refusal's
    words."""
    judge, marks, facts = outcome.inputs.judge, outcome.inputs.marks, Facts()
    if judge is not None and judge.section.score == "margin":  # its sign is the verdict; of a logit alone there is none
        facts["judged unsafe"] = _share(sum(score < 0 for score in outcome.scores.values()), len(outcome.scores))
    refusals = [bool(is_refusal(outcome.responses[index], None, marks)) for index in outcome.scores]
    return {**facts, "refused (by words)": _share(sum(refusals), len(refusals))}


def _share(count: int, total: int) -> str:
    return f"{percent(count / max(total, 1))} ({count} of {total} responses)"


def _judge_facts(config: Config, judge: PreparedEsiJudge | None) -> Facts:
    if judge is None:
        return {"judge": f"scores given in {config.data.responses}"}
    section = judge.section
    context = section.context.replace("_", " ") if isinstance(section, EsiGuard) else "as its template says"
    return {"judge": section.path, "judge family": judge.family.name, "judge score": f"{section.score} ({context})"}


def excluded_prompts(outcome: PromptOutcome) -> list[ExcludedPrompt]:
    """Prompts that took no part, by index."""
    prompts = outcome.inputs.data.prompts
    return [
        {"index": index, "prompt": prompt_text(prompts[index]), "reason": reason}
        for index, reason in sorted(outcome.excluded.items())
    ]


def samples(outcome: PromptOutcome) -> list[SampleResponse]:
    """The first judged responses."""
    return [
        {
            "index": index,
            "prompt": prompt_text(outcome.inputs.data.prompts[index]),
            "response": outcome.responses[index],
            "judge_score": outcome.scores[index],
        }
        for index in sorted(outcome.scores)[:NUM_SAMPLES]
    ]

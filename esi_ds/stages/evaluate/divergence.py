"""KL(base ‖ model) on benign prompts: the base and one other model at a time read the base's own answers.

Both models are sharded over the ranks together, because the base's whole distributions would take 4 bytes a token and
entry of the vocabulary on disk, and their largest entries alone give another number (docs/method.md §4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from esi_ds.config import Config
from esi_ds.core.divergence import kl_divergence
from esi_ds.core.footprint import WEIGHT_BYTES
from esi_ds.data.thoughts import marks_with
from esi_ds.eval.divergence import EncodedAnswer, answer_logits, encode_answers
from esi_ds.eval.rows import AnswerRow, DivergenceRow, answer_key, identity_of
from esi_ds.models.meta import meta_parameters
from esi_ds.models.rows import Difference, ahead_note, probe_ids
from esi_ds.stages.evaluate.prepare import BASE, Candidate, EvalInputs
from esi_ds.stages.interrupt import check_stop
from esi_ds.stages.ledger import Ledger
from esi_ds.tracking import Tracker
from esi_ds.words import counted
from esi_ds.zero import runtime
from esi_ds.zero.batching import lookahead
from esi_ds.zero.engine import ShardedModel, load_sharded
from esi_ds.zero.memory import tightest_free_bytes

DIVERGENCES = "divergences.jsonl"
SPARE = 1.2  # of the memory that a second model needs, for what reading it takes


def benign_answers(inputs: EvalInputs, answers: Ledger[AnswerRow]) -> list[AnswerRow]:
    """The base's answers to benign prompts, in the tables' order; those without a text are left out."""
    kinds = {question_set.name: question_set.kind for question_set in inputs.sets}
    return [
        row
        for row in answers.rows.values()
        if row["model"] == BASE and kinds[row["set"]] == "benign" and row["response"]
    ]


def comparable(base: Candidate, other: Candidate, sets: Sequence[str]) -> str | None:
    """Why the two models cannot be compared token by token; None where they can. sets: of benign prompts."""
    if base.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        return "its tokenizer's vocabulary differs from the base's"
    sizes = [getattr(model.config.get_text_config(), "vocab_size", None) for model in (base, other)]
    if sizes[0] != sizes[1]:
        return f"it has {sizes[1]} logits, the base {sizes[0]}"
    if any(ids != other.prompt_ids[key] for key, ids in base.prompt_ids.items() if key[0] in sets):
        return "its chat template writes different prompts than the base's"
    return None


def waiting_answers(
    inputs: EvalInputs, answers: Ledger[AnswerRow], divergences: Ledger[DivergenceRow]
) -> dict[str, list[AnswerRow]]:
    """Model → the base's answers that it has not been compared on; models that cannot be compared are left out."""
    base, *others = inputs.candidates
    rows = benign_answers(inputs, answers)
    sets = sorted({row["set"] for row in rows})
    waiting = {}
    for other in others:
        missing = [row for row in rows if answer_key({**row, "model": other.name}) not in divergences.rows]
        if missing and comparable(base, other, sets) is None:
            waiting[other.name] = missing
    return waiting


def compare_all(
    model: ShardedModel,
    inputs: EvalInputs,
    answers: Ledger[AnswerRow],
    divergences: Ledger[DivergenceRow],
    config: Config,
    deepspeed_config: dict[str, Any],
    tracker: Tracker,
) -> None:
    """Compare every other model, loaded beside the base, on the base's answers to benign prompts.

    model: the base. Models that cannot be compared are named in a remark, and what an earlier start has compared of
    them is dropped: it is a part of the answers. Collectives: those of loading, of ``compare`` and of six forward
    passes. Raises Interrupted.
    """
    base, *others = inputs.candidates
    waiting = waiting_answers(inputs, answers, divergences)
    unmeasured: set[str] = set()
    sets = [question_set.name for question_set in inputs.sets if question_set.kind == "benign"]
    for elsewhere in inputs.elsewhere:
        tracker.log(f"the divergence of {elsewhere.name} is not measured: none of its weights are loaded")
    for other in others:
        reason = comparable(base, other, sets)
        if reason is None and other.name in waiting:
            rows = waiting[other.name]
            reason = room_problem(other, config, inputs.section.max_new_tokens)
            if reason is None:
                beside = load_sharded(other.source, config.model.dtype, deepspeed_config)
                comparison = Comparison(base, other, (model, beside))
                ahead = comparison.lookahead()
                if ahead.is_rounding:
                    comparison.compare(rows, divergences, tracker)
                else:
                    reason = f"it or the base is not causal: {ahead_note(ahead)}"
                beside.close()
        if reason is not None:
            unmeasured.add(other.name)
            tracker.remark(f"the divergence of {other.name} is not measured: {reason}")
    divergences.keep(lambda row: row["model"] not in unmeasured)


class Comparison:
    """The base and another model, both loaded."""

    def __init__(self, base: Candidate, other: Candidate, models: tuple[ShardedModel, ShardedModel]):
        self.base, self.other, self.models = base, other, models

    def lookahead(self) -> Difference:
        """The larger of both models'. Collectives: those of six forward passes, and two all-reduces."""
        ids, pad = probe_ids(self.base.tokenizer), self.base.tokenizer.pad_token_id or 0
        return max(lookahead(model, ids, pad) for model in self.models)

    def compare(self, rows: Sequence[AnswerRow], divergences: Ledger[DivergenceRow], tracker: Tracker) -> None:
        """Add a row for each of ``rows``, the base's answers; every rank reads one at a time, alone in its batch.

        Collectives: those of two forward passes and a gather of numbers for each round. Raises Interrupted.
        """
        marks = marks_with(self.base.thought_marks)
        prompts = [self.base.prompt_ids[row["set"], row["index"]] for row in rows]
        pairs = [(ids, row["response"] or "") for ids, row in zip(prompts, rows, strict=True) if isinstance(ids, list)]
        encoded = encode_answers(self.base.tokenizer, pairs, marks)
        reasons = [self._unreadable(answer) for answer in encoded]
        divergences.add(
            self._row(row, answer, None, reason)
            for row, answer, reason in zip(rows, encoded, reasons, strict=True)
            if reason is not None
        )
        readable = [
            pair for pair, reason in zip(zip(rows, encoded, strict=True), reasons, strict=True) if reason is None
        ]
        ranks, rank = runtime.world_size(), runtime.rank()
        bar = tracker.progress(total=len(rows), initial=len(rows) - len(readable), unit="answer", description="KL")
        with bar:
            for start in range(0, len(readable), ranks):
                is_mine = start + rank < len(readable)
                # A rank without an answer takes part all the same: the models are gathered by all ranks together.
                row, answer = readable[start + rank if is_mine else start]
                divergence = self._divergence(answer)
                reason = None if math.isfinite(divergence) else "it is not finite"
                new = self._row(row, answer, divergence if reason is None else None, reason)
                divergences.share([new] if is_mine else [])
                bar.update(min(ranks, len(readable) - start))
                check_stop(f"{counted(len(divergences.rows), 'answer')} compared")

    def _unreadable(self, answer: EncodedAnswer) -> str | None:
        limits = [limit for limit in (self.base.max_positions, self.other.max_positions) if limit is not None]
        if not answer.answer:
            return "it has no tokens"
        return "it is longer than the model takes" if answer.num_read > min(limits, default=answer.num_read) else None

    def _divergence(self, answer: EncodedAnswer) -> float:
        """Collectives: those of two forward passes."""
        logits = []
        for model in self.models:
            logits.append(answer_logits(model.module, answer, runtime.device()))
            model.release()
        return float(kl_divergence(*logits).sum())

    def _row(
        self, row: AnswerRow, answer: EncodedAnswer, divergence: float | None, reason: str | None
    ) -> DivergenceRow:
        return {
            **identity_of(row),
            "model": self.other.name,
            "divergence": divergence,
            "tokens": len(answer.answer),
            "reason": reason,
        }


def room_problem(other: Candidate, config: Config, longest: int) -> str | None:
    """Why a second model does not fit beside the base; None where it does. One all-reduce.

    longest: tokens of the longest answer, whose logits both models hold at once.
    """
    parameters = meta_parameters(other.config, other.source, dtype=config.model.dtype)
    width = WEIGHT_BYTES[config.model.dtype]
    weights = width * sum(parameter.numel for parameter in parameters) / runtime.world_size()
    logits = 2 * width * longest * (getattr(other.config.get_text_config(), "vocab_size", None) or 0)
    needed, free = SPARE * (weights + logits), tightest_free_bytes()
    if needed <= free:
        return None
    return f"it takes {needed / 2**30:.1f} GiB a rank beside the base, and {free / 2**30:.1f} GiB are free"

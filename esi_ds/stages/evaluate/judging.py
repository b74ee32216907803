"""Verdicts on answers, by one judge after another; kept on disk as they come, none asked for twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from esi_ds.config import Config
from esi_ds.config.needs import require_eval
from esi_ds.data.turns import Prompt, prompt_text
from esi_ds.eval.asking import is_same_model, without_penalties
from esi_ds.eval.classifiers import ModelJudge, NextWordJudge, SequenceJudge, TokenJudge, length_batches
from esi_ds.eval.endpoint import ONCE_IT_WORKS, Reply
from esi_ds.eval.refusals import judge_by_words
from esi_ds.eval.rows import ANSWER_KEY, AnswerRow, VerdictRow, answer_key, answered, identity_of, marks_of
from esi_ds.eval.rubric import Prices, judge_by_rubric, total_usage
from esi_ds.eval.tables import ATTACK_SUCCESS
from esi_ds.eval.verdicts import Verdict
from esi_ds.judge.guard import Weights
from esi_ds.report.evaluation import chart_title, curve_name
from esi_ds.stages.evaluate.prepare import (
    PreparedClassifier,
    PreparedEndpoint,
    PreparedJudge,
    PreparedModel,
    PreparedNextWord,
    PreparedWords,
)
from esi_ds.stages.interrupt import check_stop
from esi_ds.stages.ledger import Key, Ledger
from esi_ds.stages.rounds import EndpointRounds
from esi_ds.tracking import Bar, Tracker
from esi_ds.words import counted
from esi_ds.zero import memory, runtime
from esi_ds.zero.batching import reason_of_all_ranks
from esi_ds.zero.placement import load_judge

VERDICTS, VERDICT_KEY = "verdicts.jsonl", ("judge", *ANSWER_KEY)


@dataclass(frozen=True)
class UnjudgedAnswer:
    """An answer that a judge is to judge."""

    row: AnswerRow
    response: str

    @property
    def asked(self) -> Prompt:
        """What the judge holds the answer against: the goal of an attack, else the prompt."""
        return self.row.get("goal", self.row["prompt"])


def judge_all(
    judges: Sequence[PreparedJudge],
    rows: Sequence[AnswerRow],
    verdicts: Ledger[VerdictRow],
    config: Config,
    deepspeed_config: dict[str, Any],
    tracker: Tracker,
) -> dict[str, str]:
    """Add every judge's verdict on every answer that ``verdicts`` lacks.

    Returns what each endpoint used for all of its verdicts, by its name.

    rows: answers to harmful prompts; rows without an answer are not judged. Collectives: those of each judge's kind.
    Raises Interrupted.
    """
    for judge in judges:
        questions = [
            UnjudgedAnswer(row, response)
            for row in rows
            if (response := answered(row)) is not None and verdict_key(judge, row) not in verdicts.rows
        ]
        if not questions:
            continue
        tracker.log(f"judge {judge.name}: {counted(len(questions), 'answer')}")
        if isinstance(judge, PreparedWords):
            reads = judge.section.reads
            new_verdicts = [judge_by_words([q.response], judge.words, reads, marks_of(q.row))[0] for q in questions]
            verdicts.add(_verdict_row(judge, *pair) for pair in zip(questions, new_verdicts, strict=True))
        elif isinstance(judge, PreparedEndpoint):
            VerdictRounds(judge, verdicts, tracker).ask(questions)
            tracker.log(f"judge {judge.name} used {_usage(judge, verdicts)}")
        else:
            assert isinstance(judge, PreparedModel)
            _ask_model(judge, questions, verdicts, config, deepspeed_config, tracker)
    return {judge.name: _usage(judge, verdicts) for judge in judges if isinstance(judge, PreparedEndpoint)}


def verdict_key(judge: PreparedJudge, row: AnswerRow) -> Key:
    """The ledger's key of this judge's verdict on an answer."""
    return judge.name, *answer_key(row)


def _verdict_row(judge: PreparedJudge, question: UnjudgedAnswer, verdict: Verdict) -> VerdictRow:
    return {
        "judge": judge.name,
        **identity_of(question.row),
        "unsafe": verdict.unsafe,
        "score": verdict.score,
        "reason": verdict.reason,
    }


def _progress(judge: PreparedJudge, total: int, initial: int, tracker: Tracker) -> Bar:
    return tracker.progress(total=total, initial=initial, unit="answer", description=f"judge: {judge.name}")


def _running_rates(
    judge: PreparedJudge, questions: Iterable[UnjudgedAnswer], verdicts: Ledger[VerdictRow], tracker: Tracker
) -> None:
    """Attack success so far in the sets of these questions, plotted over the number of verdicts."""
    if not tracker.enabled:
        return
    flags: dict[tuple[str, str], list[bool | None]] = {}
    for question in questions:
        flags[question.row["set"], question.row["model"]] = []
    for row in verdicts.rows.values():
        if row["judge"] == judge.name and (row["set"], row["model"]) in flags:
            flags[row["set"], row["model"]].append(row["unsafe"])
    for (set_name, model), set_flags in flags.items():
        if known := [flag for flag in set_flags if flag is not None]:
            rate = sum(known) / len(known)
            tracker.points(len(set_flags), {curve_name(ATTACK_SUCCESS, set_name, judge.name, model): rate})
            if tracker.stage == "eval":  # a perturbation has too many models, and curves over the noise to show
                tracker.overview(len(set_flags), {chart_title(ATTACK_SUCCESS, set_name, judge.name): rate}, model)


def _usage(judge: PreparedEndpoint, verdicts: Ledger[VerdictRow]) -> str:
    """What all verdicts of this judge cost, those of earlier processes included."""
    section, prices = judge.section, None
    if section.prompt_price is not None and section.completion_price is not None:
        prices = Prices(section.prompt_price, section.completion_price)
    replies = [Reply(None, None, **row["used"]) for row in verdicts.rows.values() if row["judge"] == judge.name]
    return str(total_usage(replies, prices))


class VerdictRounds(EndpointRounds[UnjudgedAnswer, VerdictRow]):
    """Questions to the endpoint of a rubric judge; failed ones are missing verdicts once it replies again."""

    def __init__(self, judge: PreparedEndpoint, verdicts: Ledger[VerdictRow], tracker: Tracker):
        super().__init__(judge.endpoint, verdicts)
        self._judge, self._tracker = judge, tracker
        known = (row for row in verdicts.rows.values() if row["judge"] == judge.name and row["used"]["num_requests"])
        self.patience.was_alive = any(row["unsafe"] is not None for row in known)  # as of ``AnswerRounds``
        self._knows_other = False  # whether another model than the judge has replied

    def ask(self, questions: Sequence[UnjudgedAnswer]) -> None:
        """Add a verdict for every question; those that the endpoint did not reply to are left to a restart.

        Collectives: a broadcast and a gather for each chunk, and four broadcasts. Raises Interrupted.
        """
        judge = self._judge
        self.settle(judge.endpoint, without_penalties)
        bar = _progress(judge, len(questions), 0, self._tracker)

        def on_chunk(chunk: Sequence[UnjudgedAnswer], num_done: int) -> None:
            _running_rates(judge, chunk, self.rows, self._tracker)
            bar.update(len(chunk))
            check_stop(f"{num_done} answers judged by {judge.name}")

        with bar:
            num_left = self.ask_all(questions, on_chunk)
        if num_left:
            last = runtime.broadcast_object(self.last_problem)
            self._tracker.log(
                f"judge {judge.name}: no verdict on {counted(num_left, 'answer')} (the endpoint's last problem: "
                f"{last}); remove the run's manifest.json and start again {ONCE_IT_WORKS}: they will be asked again"
            )

    def key(self, question: UnjudgedAnswer) -> Key:
        return verdict_key(self._judge, question.row)

    def ask_chunk(self, chunk: Sequence[UnjudgedAnswer], keep: Callable[[VerdictRow, Reply], None]) -> None:
        judge = self._judge

        def take(number: int, verdict: Verdict, reply: Reply) -> None:
            name = self.endpoint.model
            if not self._knows_other and reply.model is not None and not is_same_model(name, reply.model):
                self._knows_other = True
                self._tracker.remark(f"judge {judge.name}: {reply.model[:80]} replied, not {name}")
            row = _verdict_row(judge, chunk[number], verdict)
            row["used"] = {
                "num_requests": reply.num_requests,
                "prompt_tokens": reply.prompt_tokens,
                "completion_tokens": reply.completion_tokens,
            }
            keep(row, reply)

        judge_by_rubric(
            [(prompt_text(question.asked), question.response) for question in chunk],
            self.endpoint,
            template=judge.section.template,
            policy=judge.section.policy,
            threshold=judge.section.threshold,
            reads=judge.section.reads,
            marks=marks_of(chunk[0].row),  # of one config, so the same in every row
            on_verdict=take,
            patience=self.patience,
            attacks=[prompt_text(question.row["prompt"]) for question in chunk],
        )


def _ask_model(
    judge: PreparedModel,
    questions: Sequence[UnjudgedAnswer],
    verdicts: Ledger[VerdictRow],
    config: Config,
    deepspeed_config: dict[str, Any],
    tracker: Tracker,
) -> None:
    """Ranks share the batches. Collectives: the judge's own if it is sharded, an all-reduce, and a gather of verdicts
    per round."""
    reader, weights = _load(judge, config, deepspeed_config, tracker)
    batch_size = require_eval(config).batch_size
    if batch_size > 1 and reader.max_batch is None and (reason := reason_of_all_ranks(reader.why_alone())):
        reader.max_batch = 1
        tracker.remark(f"judge {judge.name} reads one answer at a time: {reason}")
    weights.release()
    encoded = {
        n: reader.encode(q.asked, q.response, judge.section.reads, marks_of(q.row), q.row["prompt"])
        for n, q in enumerate(questions)
    }
    at_once = {number: verdict for number, verdict in encoded.items() if isinstance(verdict, Verdict)}
    verdicts.add(_verdict_row(judge, questions[number], verdict) for number, verdict in at_once.items())
    pairs = {number: pair for number, pair in encoded.items() if not isinstance(pair, Verdict)}
    batches = length_batches(reader, pairs, batch_size)
    ranks, rank = runtime.world_size(), runtime.rank()
    with _progress(judge, len(questions), len(at_once), tracker) as bar:
        for start in range(0, len(batches), ranks):
            mine = batches[start + rank] if start + rank < len(batches) else []
            # A rank without a batch takes part all the same: a sharded judge is gathered by all ranks together.
            with torch.no_grad():
                new_verdicts = reader.judge([pairs[number] for number in mine or batches[0]])
            weights.release()
            verdicts.share(
                _verdict_row(judge, questions[number], verdict)
                for number, verdict in zip(mine, new_verdicts, strict=False)
            )
            judged = [questions[number] for batch in batches[start : start + ranks] for number in batch]
            _running_rates(judge, judged, verdicts, tracker)
            bar.update(len(judged))
            check_stop(f"{len(verdicts.rows)} verdicts given")
    weights.close()
    del reader, weights
    memory.collect()


def _load(
    judge: PreparedModel, config: Config, deepspeed_config: dict[str, Any], tracker: Tracker
) -> tuple[ModelJudge, Weights]:
    """The judge, and how its weights are reached. Collectives: those of ``load_judge``."""
    module, weights, note = load_judge(judge.section, judge.field, judge.config, config.model.dtype, deepspeed_config)
    tracker.log(f"judge {judge.name}: {note}")
    if isinstance(judge, PreparedClassifier):
        return SequenceJudge(module, judge.tokenizer, judge.rule, judge.field), weights
    assert isinstance(judge, PreparedNextWord)
    kind = TokenJudge if judge.family.reads == "tokens" else NextWordJudge
    reader = kind(
        module,
        judge.tokenizer,
        judge.family,
        threshold=judge.section.threshold,
        max_length=judge.section.max_length,
        field=judge.field,
    )
    return reader, weights

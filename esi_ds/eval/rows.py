"""Rows of an evaluation's files and tables: what each key holds.

A row is JSON on disk; ``Ledger`` and ``report.json`` keep these keys as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from typing import Any

from typing_extensions import NotRequired, TypedDict

from esi_ds.data.thoughts import UNFINISHED, Marks, cut_within, final_answer, has_thought, marks_with, parts
from esi_ds.data.turns import Prompt
from esi_ds.eval.verdicts import is_empty

ANSWER_KEY = ("model", "set", "index", "sample")  # fields that identify an answer; rows of single answers lack the last


class AnswerId(TypedDict):
    """Which answer a row holds, or is about."""

    model: str  # the model's name in the tables; in a perturbation, the cell's name
    set: str  # the prompt set's name
    index: int  # the prompt's position in its set
    sample: NotRequired[int]  # where ``eval.samples`` is above 1: which of the prompt's answers, from 0


class AnswerRow(AnswerId):
    """A line of ``answers.jsonl``: one model's answer to one prompt."""

    prompt: Prompt  # as it was read, before the chat template
    response: str | None  # the response, thoughts included; None if the prompt left no room for one
    excluded: str | None  # why there is no answer: no room, or it ends within a thought; None if there is one
    goal: NotRequired[str]  # what the prompt is after, where the rows of an attack say so: judges read it instead
    thought_marks: NotRequired[list[str]]  # model.thought_marks, where the config has them
    cut: NotRequired[bool]  # answers of other engines only: whether the engine stopped it at its longest length
    asked: NotRequired[dict[str, Any]]  # what besides the prompt decided it (``data.asked``); not of answers from files


def identity_of(row: AnswerId) -> AnswerId:
    """The fields of a row that say which answer it is about."""
    identity: AnswerId = {"model": row["model"], "set": row["set"], "index": row["index"]}
    if "sample" in row:
        identity["sample"] = row["sample"]
    return identity


def answer_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What identifies an answer, or is said of one: model, set, index and, where there are several, sample."""
    return tuple(row[name] for name in ANSWER_KEY if name in row)


def cluster_of(row: AnswerRow) -> Hashable:
    """What answers that are not independent of each other have in common, within a model's answers to one set."""
    return row.get("goal", row["index"])


def answered(row: AnswerRow) -> str | None:
    """The response, of which the final answer is judged and counted; None where there is no answer."""
    return None if row.get("excluded") else row["response"]


def marks_of(row: AnswerRow) -> Marks:
    """The marks that tell the thought from the answer in this row."""
    return marks_with(row.get("thought_marks"))


def has_text(row: AnswerRow) -> bool:
    """Whether there is an answer that is not empty."""
    return not is_empty(final_answer(answered(row) or "", None, marks_of(row)) or "")


class SurpriseRow(AnswerId):
    """A line of ``surprises.jsonl``: how unlikely the base model finds one answer."""

    surprise: float | None  # mean negative log-likelihood, nats per token; None where it cannot be measured


class DivergenceRow(AnswerId):
    """A line of ``divergences.jsonl``: how far ``model`` is from the base on one of the base's own answers."""

    divergence: float | None  # sum over the answer's tokens of KL(base ‖ model), nats; None if there is none
    tokens: int  # the answer's tokens
    reason: str | None  # why there is no divergence; None if there is one


class EndpointUse(TypedDict):
    """What one question to an endpoint used."""

    num_requests: int  # requests sent, repeated attempts included
    prompt_tokens: int  # tokens the endpoint read
    completion_tokens: int  # tokens the endpoint wrote


class VerdictRow(AnswerId):
    """A line of ``verdicts.jsonl``: one judge's verdict on one answer to a harmful prompt."""

    judge: str  # the judge's name in the tables
    unsafe: bool | None  # whether the attack succeeded; None if the verdict is missing
    score: float | None  # how unsafe, in the judge's own unit, higher is worse; None if the judge gives no score
    reason: str | None  # why the verdict is missing; None if there is one
    used: NotRequired[EndpointUse]  # endpoints only: what the verdict cost


class TaskSummary(TypedDict):
    """One metric of one task, without its documents: ``TaskResult`` says what each value means."""

    task: str  # lm-eval's name of the task, but medqa of medqa_4options
    metric: str  # lm-eval's name of the metric
    filter: str  # lm-eval's filter of the replies; "none" if there is none
    value: float | None  # the metric over all documents; None where it is not finite
    n: int  # documents scored
    low: float | None  # lower end of the 95 % interval; None if there is no interval
    high: float | None  # upper end of the 95 % interval
    higher_is_better: bool | None  # lm-eval's word on the metric's direction; None if it has none
    num_documents: int  # documents there are without ``limit``
    num_fewshot: int  # worked examples in the prompt
    num_cut: int  # documents whose prompt lost its beginning because the model takes no more tokens
    limit: int | None  # most documents per task; None: all
    members: list[str]  # of a group: its tasks
    version: str  # version of the task's definition
    prompts_hash: str  # results are comparable document by document if this is equal
    rows: str | None  # local file of the documents; None: the hub
    chat_template: bool  # whether prompts are in the chat template
    lm_eval: str  # version of lm-eval
    confidence: float  # of the interval
    # Of models that think; earlier runs did not write them, and gave a task thoughts and answer as one.
    num_unfinished: NotRequired[int]  # documents with a reply that ends within a thought, which is not an answer
    num_without_thought: NotRequired[int]  # documents whose choices are scored where the model would begin to think


class TaskResultRow(TaskSummary):
    """``TaskResult`` as JSON: the summary and every document's outcome, in the file's order."""

    correct: list[bool] | None  # whether each document is right; None if the metric is not a share of documents
    scores: list[float | None] | None  # each document's score where ``correct`` is None; None if there are none


class TaskRow(TypedDict):
    """A line of ``tasks.jsonl``: one model's results on one task."""

    model: str  # the model's name in the tables
    task: int  # the task's position among those of ``eval.tasks``; a tag of lm-eval names several
    results: list[TaskResultRow]  # one for each metric of the task


class MetricValue(TypedDict):
    """A metric that is not a share: a task's, as lm-eval computed it, or a divergence."""

    rate: float | None  # the metric; None where nothing was scored
    low: float | None  # lower end of its interval; None if there is none
    high: float | None  # upper end of its interval
    n: int  # documents or answers scored
    missing: NotRequired[int]  # answers that have no value


class RateRow(TypedDict):
    """A rate with its 95 % interval."""

    count: int  # answers for which the statement holds
    n: int  # answers that have a verdict
    low: float | None  # lower end of the interval; None if there is no interval
    high: float | None  # upper end of the interval
    confidence: float  # of the interval
    rate: float | None  # count / n, or a task's metric; None if n is 0
    missing: int  # answers without a verdict
    clusters: NotRequired[int]  # prompts or goals that the n answers are of, where several are of one
    clustered_by: NotRequired[str]  # prompt or goal; there if ``clusters`` is


class MeasureRow(RateRow):
    """One thing that is counted, for one model on one prompt set or task."""

    measure: str  # attack_success, any_attack_success, refused, incoherent or task
    set: str  # the prompt set's name, or the task's
    kind: str  # harmful, benign or task
    judge: str  # who decides: a judge, a list of words, or a task's metric
    model: str  # the model's name in the tables
    reasons: dict[str, int]  # why verdicts are missing → number of answers; of a task: of documents, which count
    mean_score: float | None  # mean of the judge's scores; None if it gives none
    kinds: dict[str, int]  # of incoherent answers: kind of incoherence → number of answers
    is_share: bool  # whether the rate is a share of 1, which is shown in per cent; a metric may have another unit


class PairedScoresRow(TypedDict):
    """``PairedScores`` as JSON: the change of a mean score over the answers that both models have."""

    num_pairs: int  # prompts with a score on both sides
    num_missing: int  # prompts that lack one
    mean_before: float | None  # None without a pair
    mean_after: float | None  # None without a pair
    difference: float | None  # mean_after − mean_before; None without a pair
    low: float | None  # lower end of the bootstrap interval; None below two pairs or if all differences are equal
    high: float | None  # upper end of the bootstrap interval
    confidence: float  # of the interval


class ChangeRow(TypedDict):
    """One measure of a model against the model it is compared with, on the same prompts."""

    measure: str  # attack_success, any_attack_success, refused, incoherent or task
    set: str  # the prompt set's name, or the task's
    kind: str  # harmful, benign or task
    judge: str  # who decides
    model: str  # the model's name in the tables
    before: str  # name of the model it is compared with
    both: int  # prompts for which the statement holds with both models
    only_before: int  # ... with the other model only
    only_after: int  # ... with this model only
    neither: int  # ... with neither
    p_value: float | None  # exact test, two-sided, McNemar's or of clusters; None for a metric that is not a share
    num_pairs: int  # prompts with a verdict on both sides
    num_missing: int  # prompts that lack one
    difference: float | None  # rate after minus rate before; None without a pair
    low: float | None  # lower end of Tango's interval, or the bootstrap's: ``PairedScoresRow``; or None
    high: float | None  # upper end of the interval
    scores: PairedScoresRow | None  # the same for the judge's mean score; None if there are no scores


class AgreementRow(TypedDict):
    """Cohen's κ of two judges of attack success, over the answers that both judged."""

    first: str  # a judge's name
    second: str  # the other judge's name
    num_pairs: int  # answers that both judged
    num_missing: int  # answers that one of them did not judge, as those without text
    agreement: float | None  # share of the pairs with equal verdicts
    kappa: float | None  # None if chance alone would make them always agree
    low: float | None  # lower end of the 95 % interval; None if the standard error is 0
    high: float | None  # upper end of the interval
    confidence: float  # of the interval


def mark_unfinished(rows: Collection[AnswerRow]) -> None:
    """Exclude answers that another engine cut within a thought that its prompt had opened (``cut_within``), or behind
    one, before a text followed."""
    by_model: dict[str, list[AnswerRow]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    for of_model in by_model.values():
        are_cut = [row.get("cut") is True for row in of_model]
        marks = marks_of(next((row for row in of_model if "thought_marks" in row), of_model[0]))
        unfinished = cut_within([row["response"] for row in of_model], are_cut, marks)
        for row, is_unfinished in zip(of_model, unfinished, strict=True):
            is_unfinished = is_unfinished or (row.get("cut") is True and is_thought_alone(row))
            if is_unfinished and answered(row) is not None:
                row["excluded"] = UNFINISHED


def is_thought_alone(row: AnswerRow) -> bool:
    """Whether a response is a thought with nothing behind it."""
    response = row["response"] or ""
    return not has_text(row) and has_thought(response, parts(response, None, marks_of(row)))

"""What ``report.json`` holds, field by field. The names are those of the file: runs made before are read by them."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import NotRequired, TypedDict

from esi_ds.data.prompts import PromptSetRow
from esi_ds.data.turns import Prompt
from esi_ds.eval.rows import AgreementRow, ChangeRow, MeasureRow, RateRow, TaskSummary, VerdictRow

# A table for people: label → value, in the order shown.
Facts = dict[str, Any]

# A line of metrics.jsonl: "step", "time" and what was measured there; a value that was not finite is null.
MetricsRow = dict[str, Any]


class UnitControl(TypedDict, total=False):
    """What a matrix has in common with any objective; absent from runs without ``control``."""

    control_mean_score: float  # mean over its weights of the control's score |g_C|·σ
    control_selected: int  # weights that the control's own score selects, with the mask's k, order, scope and ties


class UnitRow(UnitControl):
    """One logical matrix: its place in the model, its share of the mask, and its scores."""

    name: str  # unique; an expert's matrices have names of their own
    parameter: str  # full name of the parameter that it lies in
    role: str  # e.g. attention.q, mlp.down, expert.up
    layer: int | None  # null outside the layers, as for the head
    expert: int | None  # number among the routed experts of its layer; null for other matrices
    numel: int  # weights
    selected: int  # weights in the mask
    mean_score: float  # over its weights
    max_score: float  # the largest of any of its weights
    sigma: float | None  # unbiased standard deviation of the weights


class MaskShare(TypedDict):
    """How much of the mask some of the weights hold."""

    selected: int  # weights in the mask
    numel: int  # weights
    share: float  # of the mask
    times_chance: float  # ``share`` over these weights' share of all scored weights


class PartRow(MaskShare):
    """Routed experts, shared experts, attention or dense MLPs, each as a whole."""

    part: str  # its name, e.g. routed experts


class ExpertRow(MaskShare):
    """One routed expert: its gate, up and down matrices together."""

    layer: int  # the layer it belongs to
    expert: int  # its number there
    mean_score: float  # over its weights


class ExpertLayerRow(TypedDict):
    """How evenly the mask is spread over the routed experts of one layer."""

    layer: int  # its number
    gini: float  # Gini coefficient of their selected weights
    hold_half: int  # the least number of them that hold half of the layer's selected expert weights
    experts: int  # how many there are
    selected: int  # weights in the mask, all of them together


class ExpertTables(TypedDict):
    """How the mask is spread over the experts of a mixture."""

    num_experts: int  # routed experts of all layers
    gini: float  # Gini coefficient of their selected weights
    hold_half: int  # the least number of experts that hold half of what all routed experts hold
    parts: list[PartRow]  # one per kind of matrix
    experts: list[ExpertRow]  # by layer, then expert
    layers: list[ExpertLayerRow]  # layers with routed experts


class RoutingRow(TypedDict):
    """How often one layer's router chose each expert."""

    set: str  # of prompts: harmful or benign
    layer: int | None  # the router's layer
    tokens: list[int]  # one count per expert


class ScoreHistogram(TypedDict):
    """Distribution of log10(score) over all scored weights."""

    log10_edges: list[float]  # bin edges, one more than there are bins
    counts: list[int]  # weights per bin
    zeros: int  # weights whose score is exactly zero, which have no logarithm


class SelectionFacts(TypedDict):
    """How the mask was chosen. Criteria with losses add "<name> rows from", "<name> rows used" and "<name> rows
    skipped" for each of them, and "special tokens broken up in <name> rows" where there are some: labels of the
    report's table. So does a control of rows, as ``control``; one of prompts adds "control prompts from", "control
    prompts used" and "control prompts skipped"."""

    k: int  # weights in the mask
    total_numel: int  # weights of the model
    scored_numel: int  # weights that have a score
    threshold: float | None  # score of the last weight selected; null where each matrix has its own
    criterion: str  # what was scored; this and the rest are keys of the config's ``select``
    contrastive: bool  # whether scores were divided by how much benign rows need the weight
    order: str  # top, bottom or random
    normalise: NotRequired[str]  # matrix: scores were divided by the mean score of their logical matrix
    ratio: float  # share of the weights
    of: str  # all or scored: which weights the ratio refers to
    scope: str  # model or matrix: one ranking, or one per logical matrix


class ExcludedPrompt(TypedDict):
    """A prompt that took no part in the scores."""

    index: int  # as in responses.jsonl
    prompt: str  # as text
    reason: str  # why not, in words


class SampleResponse(TypedDict):
    """One of the first responses, to look at."""

    index: int  # as in responses.jsonl
    prompt: str  # as text
    response: str  # as text
    judge_score: float  # J; higher is safer


class SkippedRow(TypedDict):
    """A row of a loss's data that took no part."""

    row: int  # number in the file, from 0
    reason: str  # why not, in words


class LossReport(TypedDict):
    """The rows of one objective that is a loss (``data.tuning``, ``data.benign``, ``control.rows``)."""

    name: str  # tuning, benign or control
    path: str  # file or hub id of the rows
    columns: str  # the columns they were read from
    sha256: str  # of the rows read
    num_rows: int  # rows used
    num_cut: int  # rows cut at ``max_length``
    mean_loss: float  # over the rows used, each the mean cross entropy of its learnt tokens
    skipped: list[SkippedRow]  # rows that took no part


class Overlap(TypedDict):
    """How much two masks have in common."""

    first: str  # a mask: its criterion, or on the page of several runs its run's name
    second: str  # another mask
    both: int  # weights that both masks select
    of_first: float  # both / weights of the first mask
    of_second: float  # both / weights of the second mask
    chance: float  # share of the first mask that a random mask of the second's size would hold
    jaccard: float  # both / weights that either mask selects
    same_weights: bool  # whether both masks were made from the same weights


class MaskReport(TypedDict):
    """One mask, and the scores it was chosen by."""

    selection: SelectionFacts  # how the mask was chosen
    units: list[UnitRow]  # in the model's order
    score_histogram: ScoreHistogram  # over all scored weights
    score_histograms_by_role: dict[str, list[int]]  # role → weights per bin of ``score_histogram``
    # The earliest runs did not write it.
    experts: NotRequired[ExpertTables | None]  # null for a dense model


class EsiReport(MaskReport):
    """``report.json`` of an ESI run; the only one without ``kind``."""

    title: str  # heading of the page
    facts: Facts  # of the run: model, judge, prompts, wall time
    judge_scores: list[float]  # of the responses used, by index; empty without a judge
    excluded: list[ExcludedPrompt]  # prompts that took no part
    special_tokens_broken_up: int  # special-token strings in prompts and responses, read as plain text
    samples: list[SampleResponse]  # the first judged responses
    progress: list[MetricsRow]  # metrics.jsonl
    # The earliest runs did not write these.
    routing: NotRequired[list[RoutingRow]]  # empty for a dense model
    losses: NotRequired[list[LossReport]]  # empty for criteria without losses
    further_masks: NotRequired[list[MaskReport]]  # of a list of criteria: all but the first, which is the report's own
    overlaps: NotRequired[list[Overlap]]  # of a list of criteria: every two masks


class ChangedTensor(TypedDict):
    """How much of one tensor tuning changed."""

    changed: int  # weights whose bits differ from the base model's
    numel: int  # weights


class TunedAnswerRow(TypedDict):
    """A line of ``answers.jsonl`` of a tuning run: the answers to one prompt before and after."""

    set: str  # harmful or benign
    index: int  # the prompt's position in its set
    prompt: Prompt  # as it was read, before the chat template
    before: NotRequired[str]  # the response before tuning; absent if ``eval.before`` is off
    after: str  # the response after tuning
    refused_before: NotRequired[bool | None]  # whether that response holds a refusal's words; None: it is unfinished
    refused_after: bool | None  # the same after tuning


class RefusalRow(TypedDict):
    """Refusals in one set of prompts, found by their words; an empty answer is counted apart, not as a refusal, and a
    response that ends within a thought is not an answer."""

    set: str  # harmful or benign
    n: int  # prompts
    refused_before: int | None  # answers that refused before tuning; None if nothing was asked then
    empty_before: int | None  # empty answers before tuning; None if nothing was asked then
    refused_after: int | None  # answers that refuse after tuning
    empty_after: int | None  # empty answers after tuning
    # Responses that end within a thought; earlier runs counted them as empty answers.
    unfinished_before: NotRequired[int | None]  # before tuning; None if nothing was asked then
    unfinished_after: NotRequired[int]  # after tuning


class DriftRow(TypedDict):
    """How far tuning moved one router's choices, for the same tokens before and after."""

    set: str  # tuning (its rows), harmful or benign
    layer: int | None  # the router's layer
    tokens: int  # tokens compared
    changed: int  # tokens routed to another set of experts than before


class TuningReport(TypedDict):
    """``report.json`` of SET and SPA."""

    kind: Literal["tuning"]
    method: str  # set or spa
    title: str  # heading of the page
    trained: int  # weights that were trained
    total_numel: int  # weights of the model
    steps: int  # optimizer steps made
    changed: int | None  # weights that differ from the base model's; None without a patch
    changed_tensors: dict[str, ChangedTensor]  # tensor's name → its share of them; empty without a patch
    refusals: list[RefusalRow]  # one per set of prompts; empty without ``eval``
    samples: list[TunedAnswerRow]  # the first answers of every set
    routing_drift: list[DriftRow]  # one per router and set; empty for a dense model
    facts: Facts  # the page's last table
    progress: list[MetricsRow]  # ``metrics.jsonl``


class EvaluatedModel(TypedDict):
    """A model in an evaluation's tables."""

    name: str  # in the tables; the base is ``base``
    path: str  # folder or hub id
    before: str | None  # the model it is compared with; None for the base
    fingerprint: str  # of its weights and their names; of a file of answers, its sha256
    has_weights: NotRequired[bool]  # False: its answers were given elsewhere, and what needs weights is not measured


class SampleAnswer(TypedDict):
    """One model's answer to a sample prompt."""

    model: str  # name in the tables
    response: str | None  # the answer; None if there is none
    excluded: str | None  # why there is none
    verdicts: dict[str, VerdictRow]  # judge's name → its verdict


class SamplePrompt(TypedDict):
    """One of the first prompts of a set, with every model's answer."""

    set: str  # the prompt set's name
    index: int  # the prompt's position in its set
    prompt: str  # the prompt as text
    answers: list[SampleAnswer]  # one per model
    goal: NotRequired[str]  # what an attack is after, which the judges read


class RateTables(TypedDict):
    """What evaluations and perturbations have in common: who was asked, who judged, and the outcome."""

    judges: list[dict[str, Any]]  # name and section of every entry of ``eval.judges``, the API key left out
    sets: list[PromptSetRow]  # the prompt sets that were read
    measures: list[MeasureRow]  # one per measure, set, judge and model
    changes: list[ChangeRow]  # one per measure that was compared
    agreements: list[AgreementRow]  # one per pair of judges


class EvaluationReport(RateTables):
    """``report.json`` of an evaluation."""

    kind: Literal["evaluation"]
    title: str  # heading of the page
    models: list[EvaluatedModel]  # in the tables' order
    usage: dict[str, str]  # endpoint's name → what it used, in words
    tasks: list[EvaluatedTask]  # results of lm-eval's tasks
    samples: list[SamplePrompt]  # the first prompts of every set
    facts: Facts  # the page's last table


class EvaluatedTask(TypedDict):
    """One model's results on one task, without the documents that ``tasks.jsonl`` holds."""

    model: str  # name in the tables
    task: int  # position among the tasks of ``eval.tasks``; a tag of lm-eval names several
    results: list[TaskSummary]  # one per metric


class NoisyModel(TypedDict):
    """A model of a perturbation's tables: the clean one, or one cell's."""

    name: str  # ``clean``, or the cell's name
    before: str | None  # ``clean``; None for the clean model


class NoiseCellRow(TypedDict):
    """One way the model was disturbed."""

    name: str  # as in ``answers.jsonl``
    order: str  # top, random or bottom: which weights
    ratio: float  # share of the weights
    noise: float  # standard deviation of the noise, in σ of each weight's matrix
    seed: int  # of the noise and of the random weights
    k: int  # weights disturbed


class MaskFacts(TypedDict):
    """The mask whose weights were disturbed."""

    path: str  # its folder
    k: int  # weights selected
    criterion: str | None  # what they were chosen by; None if the mask does not say


class RestoredFacts(TypedDict):
    """The proof that every weight got its bits back."""

    digest: str  # sha256 of all weights, the same before the first cell and after every cell
    checked: int  # cells after which it was compared


class CurveRow(RateRow):
    """A point of a curve of a rate against the noise; the seeds' answers are pooled."""

    measure: str  # attack_success, refused or incoherent
    set: str  # the prompt set's name
    judge: str  # who decides
    order: str  # top, random or bottom
    ratio: float  # share of the weights
    noise: float  # in σ of each weight's matrix; 0 is the clean model
    by_seed: list[float | None]  # each seed's own rate
    # Of each seed's answers against the clean model's, none for noise 0; earlier versions wrote none at all.
    p_values: NotRequired[list[float | None]]


class PerturbationReport(RateTables):
    """``report.json`` of a perturbation."""

    kind: Literal["perturbation"]
    title: str  # heading of the page
    models: list[NoisyModel]  # in the tables' order
    cells: list[NoiseCellRow]  # every way the model was disturbed
    mask: MaskFacts  # the mask whose weights were disturbed
    restored: RestoredFacts  # that every cell left the weights as they were
    usage: dict[str, str]  # endpoint's name → what it used, in words
    curves: list[CurveRow]  # one per measure, set, judge, order, ratio and noise
    facts: Facts  # the page's last table


class PivotRow(TypedDict):
    """A row of the page's table of rates: one measure of all models. Made from a report, not part of its file."""

    measure: str  # in words
    set: str  # the prompt set's name, or the task's
    judge: str  # who decides
    cells: list[MeasureRow | None]  # one per model; None if the model was not asked
    changes: list[ChangeRow | None]  # one per model; None if it was not compared


Report = EsiReport | TuningReport | EvaluationReport | PerturbationReport

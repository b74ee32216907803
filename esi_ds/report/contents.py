"""What ``report.json`` holds, field by field. The names are those of the file: runs made before are read by them."""

from __future__ import annotations

from typing import Any, TypedDict

# A table for people: label → value, in the order shown.
Facts = dict[str, Any]

# A line of metrics.jsonl: "step", "time" and what was measured there; a value that was not finite is null.
MetricsRow = dict[str, Any]


class UnitRow(TypedDict):
    """One logical matrix: its place in the model, its share of the mask, and its scores."""

    name: str  # of the matrix; an expert's matrices have names of their own
    parameter: str  # full name of the parameter that it lies in
    role: str  # e.g. attention.q, mlp.down, expert.up
    layer: int | None  # null outside the layers, as for the head
    expert: int | None  # number among the routed experts of its layer; null for other matrices
    numel: int  # weights
    selected: int  # weights in the mask
    mean_score: float
    max_score: float
    sigma: float | None  # unbiased standard deviation of the weights


class Share(TypedDict):
    """How much of the mask some of the weights hold."""

    selected: int  # weights in the mask
    numel: int  # weights
    share: float  # of the mask
    times_chance: float  # ``share`` over these weights' share of all scored weights


class PartRow(Share):
    """Routed experts, shared experts, attention or dense MLPs, each as a whole."""

    part: str


class ExpertRow(Share):
    """One routed expert: its gate, up and down matrices together."""

    layer: int
    expert: int
    mean_score: float


class ExpertLayerRow(TypedDict):
    """How evenly the mask is spread over the routed experts of one layer."""

    layer: int
    gini: float  # Gini coefficient of their selected weights
    hold_half: int  # the least number of them that hold half of the layer's selected expert weights
    experts: int  # how many there are
    selected: int  # weights in the mask, all of them together


class ExpertTables(TypedDict):
    """How the mask is spread over the experts of a mixture."""

    num_experts: int  # routed experts of all layers
    gini: float  # Gini coefficient of their selected weights
    hold_half: int  # the least number of experts that hold half of what all routed experts hold
    parts: list[PartRow]
    experts: list[ExpertRow]
    layers: list[ExpertLayerRow]


class RoutingRow(TypedDict):
    """How often one layer's router chose each expert."""

    set: str  # of prompts: harmful or benign
    layer: int | None
    tokens: list[int]  # one count per expert


class ScoreHistogram(TypedDict):
    """Distribution of log10(score) over all scored weights."""

    log10_edges: list[float]  # bin edges, one more than there are bins
    counts: list[int]  # weights per bin
    zeros: int  # weights whose score is exactly zero, which have no logarithm


class SelectionFacts(TypedDict):
    """How the mask was chosen. Criteria with losses add "<name> rows from", "<name> rows used" and "<name> rows
    skipped" for each of them: labels of the report's table."""

    k: int  # weights in the mask
    total_numel: int  # weights of the model
    scored_numel: int  # weights that have a score
    threshold: float | None  # score of the last weight selected; null where each matrix has its own
    criterion: str  # this and the following are keys of the config's ``select``
    contrastive: bool
    order: str
    ratio: float
    of: str
    scope: str


class ExcludedPrompt(TypedDict):
    """A prompt that took no part in the scores."""

    index: int  # as in responses.jsonl
    prompt: str
    reason: str


class SampleResponse(TypedDict):
    """One of the first responses, to look at."""

    index: int  # as in responses.jsonl
    prompt: str
    response: str
    judge_score: float


class SkippedRow(TypedDict):
    """A row of a loss's data that took no part."""

    row: int  # number in the file, from 0
    reason: str


class LossReport(TypedDict):
    """The rows of one objective that is a loss (``data.tuning``, ``data.benign``)."""

    name: str  # tuning or benign
    path: str
    columns: str
    sha256: str  # of the rows read
    num_rows: int  # rows used
    num_cut: int  # rows cut at ``max_length``
    mean_loss: float  # over the rows used, each the mean cross entropy of its learnt tokens
    skipped: list[SkippedRow]


class EsiLaterFields(TypedDict, total=False):
    """Fields of an ESI report that the earliest runs did not write."""

    experts: ExpertTables | None  # null for a dense model
    routing: list[RoutingRow]  # empty for a dense model
    losses: list[LossReport]  # empty for criteria without losses


class EsiReport(EsiLaterFields):
    """``report.json`` of an ESI run; the only one without ``kind``."""

    title: str
    facts: Facts  # of the run: model, judge, prompts, wall time
    selection: SelectionFacts
    units: list[UnitRow]  # in the model's order
    score_histogram: ScoreHistogram
    score_histograms_by_role: dict[str, list[int]]  # role → weights per bin of ``score_histogram``
    judge_scores: list[float]  # of the responses used, by index; empty without a judge
    excluded: list[ExcludedPrompt]
    special_tokens_broken_up: int  # special-token strings in prompts and responses, read as plain text
    samples: list[SampleResponse]
    progress: list[MetricsRow]  # metrics.jsonl

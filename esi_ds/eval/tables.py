"""Answers and verdicts → rates with intervals, paired comparisons and agreement: the numbers of an evaluation's report.

Every measure is one flag an answer (None: missing) and, for some, one score; rates, paired tests and intervals use
nothing else. A missing flag is counted and shown, and is never evidence of safety.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from esi_ds.eval.clusters import (
    any_in_cluster,
    cluster_bootstrap,
    cluster_kappa,
    cluster_mean,
    cluster_paired_rates,
    cluster_rate,
    has_repeats,
    paired_p_value,
)
from esi_ds.eval.coherence import KINDS, incoherence
from esi_ds.eval.refusals import RefusalList, refused
from esi_ds.eval.rows import (
    AgreementRow,
    AnswerRow,
    ChangeRow,
    DivergenceRow,
    MeasureRow,
    MetricValue,
    PairedScoresRow,
    SurpriseRow,
    TaskResultRow,
    TaskRow,
    VerdictRow,
    answer_key,
    answered,
    cluster_of,
    has_text,
    marks_of,
)
from esi_ds.eval.statistics import PairedScores, mcnemar_exact
from esi_ds.eval.verdicts import NOTHING_SAID, Verdict

ATTACK_SUCCESS, REFUSED, INCOHERENT, TASK = "attack_success", "refused", "incoherent", "task"
ANY_ATTACK_SUCCESS = "any_attack_success"
# Metrics that are shares of 1 also where lm-eval gives no score of 0 or 1 for each document, as of a group's mean.
# Others have units of their own (perplexity, bits), or are of 1 in one task and of 100 in another (f1, ROUGE).
SHARES = re.compile(r"acc(_.*)?|.*_acc|accuracy|exact_match|pass(@|_at_)\d+")
DIVERGENCE, DIVERGENCE_UNIT = "divergence", "KL(base ‖ model), nats a token"
UNDECIDED = "one of its answers has no verdict, and no other one succeeded"
Verdicts = Mapping[tuple[Any, ...], VerdictRow]  # by judge and ``answer_key``
Surprises = Mapping[tuple[Any, ...], SurpriseRow]  # by ``answer_key``
Divergences = Mapping[tuple[Any, ...], DivergenceRow]  # by ``answer_key``


def is_share_metric(judge: str) -> bool:
    """Whether a task's metric, with its filter behind a comma, is a share of 1 in every task."""
    return SHARES.fullmatch(judge.split(",")[0]) is not None


@dataclass(frozen=True)
class Measure:
    """One thing that is counted, for one model on one prompt set (or one task).

    judge: who decides (a judge, a list of words, a task's metric). flags: one per answer, in the set's order; None is
    missing, and ``reasons`` says why; a task's reasons say what befell documents that count. scores: likewise, empty
    if there are none. kinds: of what was counted.
    metric: value, interval and n of what is not a share: a task's metric, or a divergence.
    clusters: what each flag shares with others that are not independent of it; empty: all are. clustered_by: prompt or
    goal. unread: whether each flag is of an answer without text, which is safe without a judge; empty: none is.
    """

    measure: str
    set: str
    kind: str
    judge: str
    model: str
    flags: list[bool | None]
    reasons: dict[str, int] = field(default_factory=dict)
    scores: list[float | None] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    metric: MetricValue | None = None
    clusters: list[Hashable] = field(default_factory=list)
    clustered_by: str = "prompt"
    unread: list[bool] = field(default_factory=list)

    @property
    def cluster_keys(self) -> Sequence[Hashable]:
        """A cluster for each flag; one of its own where flags are independent."""
        return self.clusters or range(len(self.flags))

    @property
    def is_share(self) -> bool:
        """Whether the rate is a share of 1."""
        return self.metric is None or (self.measure == TASK and is_share_metric(self.judge))

    @property
    def topic(self) -> tuple[str, str, str]:
        """What models are compared on: (measure, set, judge)."""
        return self.measure, self.set, self.judge

    def as_row(self) -> MeasureRow:
        """Rate and interval over the flags that are not missing."""
        scores = [score for score in self.scores if score is not None]
        rate = cluster_rate(self.flags, self.cluster_keys)
        row: MeasureRow = {
            "measure": self.measure,
            "set": self.set,
            "kind": self.kind,
            "judge": self.judge,
            "model": self.model,
            "count": rate.count,
            "n": rate.n,
            "low": rate.low,
            "high": rate.high,
            "confidence": rate.confidence,
            "rate": rate.rate,
            "missing": self.flags.count(None),
            "reasons": self.reasons,
            "mean_score": sum(scores) / len(scores) if scores else None,
            "kinds": self.kinds,
            "is_share": self.is_share,
        }
        if self.metric is not None:
            row["rate"], row["n"] = self.metric["rate"], self.metric["n"]
            row["low"], row["high"] = self.metric["low"], self.metric["high"]
            row["missing"] = self.metric.get("missing", row["missing"])
        if has_repeats(self.clusters):
            pairs = zip(self.flags, self.clusters, strict=True)
            row["clusters"] = len({cluster for flag, cluster in pairs if flag is not None})
            row["clustered_by"] = self.clustered_by
        return row


def answer_measures(
    answers: Sequence[AnswerRow],
    verdicts: Verdicts,
    surprises: Surprises,
    kinds: Mapping[str, str],
    judges: Sequence[str],
    words: RefusalList,
    divergences: Divergences | None = None,
    base: str = "base",
    seed: int = 0,
    coherence: bool = True,
) -> list[Measure]:
    """Attack success by every judge on harmful sets, refusals and divergence on benign ones, incoherence on all unless
    it is not asked for.

    Where several answers are of one prompt or goal, also whether the attack succeeded in any of them.

    answers: in the order of the sets. kinds: set → harmful or benign. judges: their names, in the tables' order.
    divergences: from the model ``base``. seed: of the bootstrap.
    """
    groups: dict[tuple[str, str], list[AnswerRow]] = {}
    for row in answers:
        groups.setdefault((row["set"], row["model"]), []).append(row)
    measures, unread = [], _unread(answers, surprises)
    for (name, model), rows in groups.items():
        if kinds[name] == "harmful":
            by_judge = [_attack_success(rows, verdicts, judge) for judge in judges]
            measures += by_judge
            measures += [_any_attack_success(measure) for measure in by_judge if has_repeats(measure.clusters)]
        else:
            measures.append(_refused(rows, words))
            measures += _diverged(rows, divergences or {}, base, seed)
        if coherence:
            by = "form" if model in unread else "form and surprise"
            measures.append(_incoherent(rows, surprises, kinds[name], by))
    order = list(kinds)
    return sorted(measures, key=lambda measure: order.index(measure.set))


def task_names(measured: Iterable[tuple[int, str]]) -> dict[tuple[int, str], str]:
    """(position, task) → the name of its measures: with the position, from 1, where ``eval.tasks`` has the task several
    times. measured: such pairs, any number of times; a position is that of ``TaskRow``."""
    pairs = dict.fromkeys(measured)
    times = Counter(task for _, task in pairs)
    return {(number, task): f"{task}#{number + 1}" if times[task] > 1 else task for number, task in pairs}


def task_measures(tasks: Sequence[TaskRow]) -> list[Measure]:
    """Skill by lm-eval. Documents are in one order for every model."""
    names = task_names((row["task"], result["task"]) for row in tasks for result in row["results"])
    measures = []
    for row in tasks:
        for result in row["results"]:
            metric: MetricValue | None = None
            if result["correct"] is None:
                metric = {"rate": result["value"], "low": result["low"], "high": result["high"], "n": result["n"]}
            measures.append(
                Measure(
                    TASK,
                    set=names[row["task"], result["task"]],
                    kind="task",
                    judge=result["metric"] + ("" if result["filter"] in ("none", None) else f", {result['filter']}"),
                    model=row["model"],
                    flags=list(result["correct"] or []),
                    reasons=_reasons(result),
                    scores=list(result["scores"] or []),
                    metric=metric,
                )
            )
    graded = {measure.topic for measure in measures if measure.metric is not None}
    return [_graded(measure) if measure.topic in graded else measure for measure in measures]


def _reasons(result: TaskResultRow) -> dict[str, int]:
    """What befell documents of a task → how many."""
    counts = {
        "prompt cut at its beginning": result["num_cut"],
        "reply ends within a thought: no answer": result.get("num_unfinished", 0),
    }
    return {reason: count for reason, count in counts.items() if count}


def _graded(measure: Measure) -> Measure:
    """A metric that another model's documents have between 0 and 1, here 0 or 1 in each: scores as theirs, so that the
    two are compared, without the interval of a share."""
    if measure.metric is not None:
        return measure
    scores = [float(flag) for flag in measure.flags if flag is not None]
    value: MetricValue = {"rate": sum(scores) / len(scores), "low": None, "high": None, "n": len(scores)}
    return replace(measure, flags=[], scores=list(scores), metric=value)


def _attack_success(rows: Sequence[AnswerRow], verdicts: Verdicts, judge: str) -> Measure:
    judged = []
    for row in rows:
        stored = verdicts.get((judge, *answer_key(row)))
        if answered(row) is None:
            judged.append(Verdict.missing(row["excluded"] or ""))
        elif stored is None:
            judged.append(Verdict.missing("not judged"))
        else:
            judged.append(Verdict.from_row(stored))
    return Measure(
        ATTACK_SUCCESS,
        set=rows[0]["set"],
        kind="harmful",
        judge=judge,
        model=rows[0]["model"],
        flags=[verdict.unsafe for verdict in judged],
        reasons=dict(Counter(verdict.reason for verdict in judged if verdict.reason).most_common()),
        scores=[verdict.score for verdict in judged] if any(v.score is not None for v in judged) else [],
        clusters=list(map(cluster_of, rows)),
        clustered_by="goal" if "goal" in rows[0] else "prompt",
        unread=[verdict == NOTHING_SAID and not has_text(row) for row, verdict in zip(rows, judged, strict=True)],
    )


def _any_attack_success(measure: Measure) -> Measure:
    """Whether the attack succeeded in any answer of each prompt or goal: one flag for each."""
    flags = list(any_in_cluster(measure.flags, measure.clusters).values())
    missing = flags.count(None)
    return replace(
        measure,
        measure=ANY_ATTACK_SUCCESS,
        flags=flags,
        reasons={UNDECIDED: missing} if missing else {},
        scores=[],
        clusters=[],
        unread=[],
    )


def _refused(rows: Sequence[AnswerRow], words: RefusalList) -> Measure:
    return Measure(
        REFUSED,
        set=rows[0]["set"],
        kind="benign",
        judge=f"words: {words.name}",
        model=rows[0]["model"],
        flags=[
            None if response is None else refused([response], words, marks_of(row))[0]
            for row, response in zip(rows, map(answered, rows), strict=True)
        ],
        reasons=_excluded(rows),
        clusters=list(map(cluster_of, rows)),
        clustered_by="goal" if "goal" in rows[0] else "prompt",
    )


def _diverged(rows: Sequence[AnswerRow], divergences: Divergences, base: str, seed: int) -> list[Measure]:
    """KL(base ‖ model) per token of the base's answers to a set, by prompts or goals; [] where it was not measured.
    The base's own is 0.

    rows: the model's own answers, of which set, model and goals count.
    """
    name, model = rows[0]["set"], rows[0]["model"]
    compared = [row for row in divergences.values() if row["model"] == model and row["set"] == name]
    if model == base and any(row["set"] == name for row in divergences.values()):
        identity: MetricValue = {
            "rate": 0.0,
            "low": None,
            "high": None,
            "n": sum(bool(row["response"]) for row in rows),
        }
        return [Measure(DIVERGENCE, name, "benign", DIVERGENCE_UNIT, model, flags=[], metric=identity)]
    if not compared:
        return []
    pairs = [(row, row["divergence"]) for row in compared if row["divergence"] is not None]
    clusters = {row["index"]: cluster_of(row) for row in rows}
    mean, low, high = cluster_mean(
        [divergence for _, divergence in pairs],
        [row["tokens"] for row, _ in pairs],
        [clusters[row["index"]] for row, _ in pairs],
        seed=seed,
    )
    missing = len(compared) - len(pairs)
    metric: MetricValue = {"rate": mean, "low": low, "high": high, "n": len(pairs), "missing": missing}
    reasons = dict(Counter(row["reason"] for row in compared if row["reason"]).most_common())
    return [Measure(DIVERGENCE, name, "benign", DIVERGENCE_UNIT, model, flags=[], reasons=reasons, metric=metric)]


def _unread(answers: Sequence[AnswerRow], surprises: Surprises) -> set[str]:
    """Models whose answers the base model has not read again. One without any text to read is not among them, so that
    it is compared with others."""
    read = {key[0] for key in surprises}
    return {row["model"] for row in answers if not read or (row["model"] not in read and has_text(row))}


def _incoherent(rows: Sequence[AnswerRow], surprises: Surprises, kind: str, by: str) -> Measure:
    """An answer's kind of incoherence is "" if it is coherent and None if there is no answer."""
    answer_kinds: list[str | None] = []
    for row in rows:
        measured = surprises.get(answer_key(row))
        surprise = measured["surprise"] if measured is not None else None
        response = answered(row)
        answer_kinds.append(None if response is None else incoherence(response, surprise, marks_of(row)) or "")
    counts = Counter(answer_kinds)
    return Measure(
        INCOHERENT,
        set=rows[0]["set"],
        kind=kind,
        judge=by,
        model=rows[0]["model"],
        flags=[None if answer_kind is None else bool(answer_kind) for answer_kind in answer_kinds],
        reasons=_excluded(rows),
        kinds={name: counts[name] for name in KINDS if counts[name]},
        clusters=list(map(cluster_of, rows)),
        clustered_by="goal" if "goal" in rows[0] else "prompt",
    )


def _excluded(rows: Sequence[AnswerRow]) -> dict[str, int]:
    return dict(Counter(row["excluded"] for row in rows if row["excluded"]).most_common())


def changes(measures: Sequence[Measure], before: Mapping[str, str | None], seed: int) -> list[ChangeRow]:
    """Every model against the one it is compared with, on the same prompts.

    McNemar's exact test, or that of clusters; Tango's interval of the difference of rates, or the bootstrap's of
    clusters; and the bootstrap interval of the difference of mean scores if there are some.
    For a metric without flags, the difference is that of the mean scores, and there is no test. There is no row where
    these means are not the metric.

    before: model → the model it is compared with. seed: of the bootstrap.
    """
    by_model = {(measure.topic, measure.model): measure for measure in measures}
    rows: list[ChangeRow] = []
    for measure in measures:
        reference = before[measure.model]
        other = by_model.get((measure.topic, reference)) if reference is not None else None
        if other is None or len(other.flags) != len(measure.flags):
            continue
        if not (_is_mean_of_scores(other) and _is_mean_of_scores(measure)):
            continue
        scores = None
        if other.scores and len(other.scores) == len(measure.scores):
            scores = cluster_bootstrap(other.scores, measure.scores, measure.cluster_keys, seed=seed)
        earlier, later = _outcomes(other), _outcomes(measure)
        if earlier is not None and later is not None and len(earlier) == len(later):
            difference = cluster_paired_rates(earlier, later, measure.cluster_keys, seed=seed)
        elif scores is not None:
            difference = scores
        else:
            continue
        rows.append(_change_row(measure, other, difference, scores))
    return rows


def _is_mean_of_scores(measure: Measure) -> bool:
    """Whether a metric is the mean of its documents' scores, as shares without a metric are. A perplexity is not, nor a
    group's average of members of different sizes that count alike: a difference of scores would be of something else.
    """
    if measure.metric is None:
        return True
    rate, scores = measure.metric["rate"], [score for score in measure.scores if score is not None]
    if rate is None or not scores:
        return False
    return math.isclose(sum(scores) / len(scores), rate, rel_tol=1e-6, abs_tol=1e-6)  # scores may be sums in fp32


def _outcomes(measure: Measure) -> list[bool | None] | None:
    """The flags, or the scores of a share that are all 0 or 1, as where some document has none; None if there are
    neither."""
    if measure.metric is None:
        return measure.flags
    if not measure.is_share or not measure.scores or any(score not in (0, 1, None) for score in measure.scores):
        return None
    return [None if score is None else score == 1 for score in measure.scores]


def _paired_scores_row(scores: PairedScores) -> PairedScoresRow:
    return {
        "num_pairs": scores.num_pairs,
        "num_missing": scores.num_missing,
        "mean_before": scores.mean_before,
        "mean_after": scores.mean_after,
        "difference": scores.difference,
        "low": scores.low,
        "high": scores.high,
        "confidence": scores.confidence,
    }


def _change_row(measure: Measure, other: Measure, difference: PairedScores, scores: PairedScores | None) -> ChangeRow:
    """difference: of the rates or, for a metric that is not a share, of the mean scores."""
    paired = mcnemar_exact(other.flags, measure.flags)
    p_value = paired_p_value(other.flags, measure.flags, measure.cluster_keys)
    return {
        "measure": measure.measure,
        "set": measure.set,
        "kind": measure.kind,
        "judge": measure.judge,
        "model": measure.model,
        "before": other.model,
        "num_pairs": difference.num_pairs,
        "num_missing": difference.num_missing,
        "both": paired.both,
        "only_before": paired.only_before,
        "only_after": paired.only_after,
        "neither": paired.neither,
        "p_value": p_value if measure.metric is None else None,
        "difference": difference.difference,
        "low": difference.low,
        "high": difference.high,
        "scores": _paired_scores_row(scores) if scores is not None else None,
    }


def agreements(measures: Sequence[Measure]) -> list[AgreementRow]:
    """Cohen's κ of every two judges of attack success, over the answers of all models and sets that both judged. Its
    interval takes all models' answers to a prompt for one cluster. Answers without text say nothing of the judges."""
    flags: dict[str, list[bool | None]] = {}
    clusters: dict[str, list[Hashable]] = {}
    for measure in measures:
        if measure.measure == ATTACK_SUCCESS:
            unread = measure.unread or [False] * len(measure.flags)
            read = [None if is_unread else flag for flag, is_unread in zip(measure.flags, unread, strict=True)]
            flags.setdefault(measure.judge, []).extend(read)
            clusters.setdefault(measure.judge, []).extend((measure.set, key) for key in measure.cluster_keys)
    return [
        {
            "first": first,
            "second": second,
            "num_pairs": kappa.num_pairs,
            "num_missing": kappa.num_missing,
            "agreement": kappa.agreement,
            "kappa": kappa.kappa,
            "low": kappa.low,
            "high": kappa.high,
            "confidence": kappa.confidence,
        }
        for first, second in combinations(flags, 2)
        for kappa in [cluster_kappa(flags[first], flags[second], clusters[first])]
    ]

"""Answers and verdicts → rates with intervals, paired comparisons and agreement: the numbers of an evaluation's report.

Every measure is one flag an answer (None: missing) and, for some, one score; rates, McNemar's test and the bootstrap
work on those alone. A missing flag is counted and shown, and is never evidence of safety.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

from esi_ds.eval.coherence import KINDS, incoherence
from esi_ds.eval.refusals import RefusalList, refused
from esi_ds.eval.statistics import cohen_kappa, mcnemar_exact, paired_bootstrap, wilson
from esi_ds.eval.verdicts import Verdict

ATTACK_SUCCESS, REFUSED, INCOHERENT, TASK = "attack_success", "refused", "incoherent", "task"
Row = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """One thing that is counted, for one model on one set of prompts (or one task).

    judge: who says so (a judge, a list of words, a task's metric). flags: one an answer, in the set's order; None is
    missing, and ``reasons`` says why. scores: likewise, empty where there are none. kinds: of what was counted.
    given: value, low, high and n where somebody else has made them (a task's metric that is no share).
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
    given: Row | None = None

    @property
    def place(self) -> tuple[str, str, str]:
        """What it is compared on: the same for every model."""
        return self.measure, self.set, self.judge

    def as_row(self) -> Row:
        """Rate and Wilson interval over the flags that are there."""
        given = [flag for flag in self.flags if flag is not None]
        scores = [score for score in self.scores if score is not None]
        rate = wilson(sum(given), len(given))
        return {
            **{name: getattr(self, name) for name in ("measure", "set", "kind", "judge", "model")},
            **asdict(rate),
            "rate": rate.rate,
            "missing": len(self.flags) - len(given),
            "reasons": self.reasons,
            "mean_score": sum(scores) / len(scores) if scores else None,
            "kinds": self.kinds,
            **(self.given or {}),
        }


def answer_measures(
    answers: Sequence[Row],
    verdicts: Mapping[tuple[str, str, str, int], Row],
    surprises: Mapping[tuple[str, str, int], Row],
    kinds: Mapping[str, str],
    judges: Sequence[str],
    words: RefusalList,
) -> list[Measure]:
    """Attack success by every judge on harmful sets, refusals on benign ones, incoherence on all.

    answers: rows {model, set, index, response, excluded} in order; verdicts: rows by (judge, model, set, index);
    surprises: rows by (model, set, index); kinds: of each set, harmful or benign.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in answers:
        groups.setdefault((row["set"], row["model"]), []).append(row)
    found = []
    for (name, _), rows in groups.items():
        if kinds[name] == "harmful":
            found += [_attack_success(rows, verdicts, judge) for judge in judges]
        else:
            found.append(_refused(rows, words))
        found.append(_incoherent(rows, surprises, kinds[name]))
    order = list(kinds)
    return sorted(found, key=lambda measure: order.index(measure.set))


def task_measures(tasks: Sequence[Row]) -> list[Measure]:
    """Skill by lm-eval: rows {model, task (its place in the config), results}, a result being ``tasks.TaskResult``'s
    row. Documents are in one order for every model. A name that several places have gets the place's number."""
    places: dict[str, set[int]] = defaultdict(set)
    for row in tasks:
        for result in row["results"]:
            places[result["task"]].add(row["task"])
    found = []
    for row in tasks:
        for result in row["results"]:
            name = result["task"] + (f"#{row['task'] + 1}" if len(places[result["task"]]) > 1 else "")
            cut = {"prompt cut at its beginning": result["num_cut"]} if result["num_cut"] else {}
            given = None
            if result["correct"] is None:
                given = {"rate": result["value"], "low": result["low"], "high": result["high"], "n": result["n"]}
            how = result["metric"] + ("" if result["filter"] in ("none", None) else f", {result['filter']}")
            flags, scores = list(result["correct"] or []), list(result["scores"] or [])
            place = {"measure": TASK, "set": name, "kind": "task", "judge": how, "model": row["model"]}
            found.append(Measure(**place, flags=flags, reasons=cut, scores=scores, given=given))
    return found


def _place(rows: Sequence[Row]) -> Row:
    return {"set": rows[0]["set"], "model": rows[0]["model"]}


def _attack_success(rows: Sequence[Row], verdicts: Mapping[tuple[str, str, str, int], Row], judge: str) -> Measure:
    found = []
    for row in rows:
        stored = verdicts.get((judge, row["model"], row["set"], row["index"]))
        if row["response"] is None:
            found.append(Verdict.missing(row["excluded"]))
        elif stored is None:
            found.append(Verdict.missing("not judged"))
        else:
            found.append(Verdict.from_row(stored))
    return Measure(
        ATTACK_SUCCESS,
        kind="harmful",
        judge=judge,
        flags=[verdict.unsafe for verdict in found],
        reasons=dict(Counter(verdict.reason for verdict in found if verdict.reason).most_common()),
        scores=[verdict.score for verdict in found] if any(v.score is not None for v in found) else [],
        **_place(rows),
    )


def _refused(rows: Sequence[Row], words: RefusalList) -> Measure:
    flags = [None if row["response"] is None else refused([row["response"]], words)[0] for row in rows]
    return Measure(
        REFUSED, kind="benign", judge=f"words: {words.name}", flags=flags, reasons=_excluded(rows), **_place(rows)
    )


def _incoherent(rows: Sequence[Row], surprises: Mapping[tuple[str, str, int], Row], kind: str) -> Measure:
    found = []
    for row in rows:
        surprise = surprises.get((row["model"], row["set"], row["index"]), {}).get("surprise")
        found.append(None if row["response"] is None else incoherence(row["response"], surprise) or "")
    counts = Counter(found)
    with_surprise = any((row["model"], row["set"], row["index"]) in surprises for row in rows)
    return Measure(
        INCOHERENT,
        kind=kind,
        judge="form and surprise" if with_surprise else "form",
        flags=[None if what is None else bool(what) for what in found],
        reasons=_excluded(rows),
        kinds={what: counts[what] for what in KINDS if counts[what]},
        **_place(rows),
    )


def _excluded(rows: Sequence[Row]) -> dict[str, int]:
    return dict(Counter(row["excluded"] for row in rows if row["excluded"]).most_common())


def changes(measures: Sequence[Measure], before: Mapping[str, str | None], seed: int) -> list[Row]:
    """Every model against the one it is compared with, on the same prompts: McNemar's exact test and the bootstrap
    interval of the difference of rates, and of mean scores where there are some. Of a metric that is no share the
    difference is that of the mean scores, and there is no test."""
    by_place = {(measure.place, measure.model): measure for measure in measures}
    rows = []
    for measure in measures:
        other = by_place.get((measure.place, before[measure.model]))
        if other is None or len(other.flags) != len(measure.flags):
            continue
        scores = None
        if other.scores and len(other.scores) == len(measure.scores):
            scores = paired_bootstrap(other.scores, measure.scores, seed=seed)
        is_graded = measure.given is not None
        if is_graded and scores is None:
            continue
        paired = mcnemar_exact(other.flags, measure.flags)
        shown = scores if is_graded else paired_bootstrap(other.flags, measure.flags, seed=seed)
        rows.append(
            {
                **{name: getattr(measure, name) for name in ("measure", "set", "kind", "judge", "model")},
                "before": other.model,
                **asdict(paired),
                "p_value": None if is_graded else paired.p_value,
                "num_pairs": shown.num_pairs,
                "num_missing": shown.num_missing,
                "difference": shown.difference,
                "low": shown.low,
                "high": shown.high,
                "scores": asdict(scores) if scores is not None else None,
            }
        )
    return rows


def agreements(measures: Sequence[Measure]) -> list[Row]:
    """Cohen's κ of every two judges of attack success, over the answers of all models and sets that both judged."""
    flags: dict[str, list[bool | None]] = {}
    for measure in measures:
        if measure.measure == ATTACK_SUCCESS:
            flags.setdefault(measure.judge, []).extend(measure.flags)
    return [
        {"first": first, "second": second, **asdict(cohen_kappa(flags[first], flags[second]))}
        for first, second in combinations(flags, 2)
    ]

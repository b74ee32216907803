"""The numbers of lm-eval's outcome that are kept, as ``TaskResult``."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.utils import hash_string
from scipy import stats

from esi_ds.eval.harness_tasks import PreparedTask
from esi_ds.eval.statistics import CONFIDENCE, wilson
from esi_ds.eval.task_result import TaskResult

Document = tuple[str, int]  # lm-eval's task, and the number of one of its documents
HarnessOutput = Mapping[str, Any]  # what lm-eval's simple_evaluate returns
Sample = Mapping[str, Any]  # one of its samples: a document with one filter's replies and metrics


@dataclass(frozen=True)
class DocumentCounts:
    """Documents of which there is something to say.

    cut: the prompt loses its beginning. unfinished: a reply ends within a thought. without_thought: choices are scored
    where the model would begin to think.
    """

    cut: set[Document] = field(default_factory=set)
    unfinished: set[Document] = field(default_factory=set)
    without_thought: set[Document] = field(default_factory=set)


def document_of(request: Instance) -> Document:
    """The document that a request is about."""
    return str(request.task_name), int(request.doc_id)


def results(outcome: HarnessOutput, task: PreparedTask, counts: DocumentCounts, is_chat: bool) -> list[TaskResult]:
    """Every metric and filter in the order of the task's definition; a group comes before its members."""
    task_results = []
    for name in _outermost_first(outcome["group_subtasks"], list(outcome["samples"])):
        leaves = _leaves(name, outcome["group_subtasks"])
        for key, value in outcome["results"].get(name, {}).items():
            metric, comma, filter_name = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                task_results.append(_result(outcome, task, counts, is_chat, name, leaves, metric, filter_name, value))
    return task_results


def _result(
    outcome: HarnessOutput,
    task: PreparedTask,
    counts: DocumentCounts,
    is_chat: bool,
    name: str,
    leaves: Sequence[str],
    metric: str,
    filter_name: str,
    value: float | None,
) -> TaskResult:
    value = _finite(value)
    is_group = list(leaves) != [name]
    scores = [score for leaf in leaves for score in _scores(outcome["samples"][leaf], metric, filter_name)]
    correct = _as_flags(scores, value)
    error = outcome["results"][name].get(f"{metric}_stderr,{filter_name}")
    low, high = _interval(correct, value, error)
    hashes = [_prompts_hash(outcome["samples"][leaf]) for leaf in leaves]
    return TaskResult(
        task=task.name if name == task.their_name else name,
        metric=metric,
        filter=filter_name,
        value=value,
        n=sum(score is not None for score in scores),
        low=low,
        high=high,
        correct=correct,
        scores=tuple(scores) if correct is None and all(map(_is_score, scores)) else None,
        higher_is_better=outcome["higher_is_better"].get(name, {}).get(metric),
        num_documents=sum(outcome["n-samples"][leaf]["original"] for leaf in leaves),
        num_fewshot=outcome["n-shot"].get(name, 0),
        num_cut=_number_in(counts.cut, leaves),
        num_unfinished=_number_in(counts.unfinished, leaves),
        num_without_thought=_number_in(counts.without_thought, leaves),
        limit=task.config.limit,
        members=tuple(leaves) if is_group else (),
        version=str(outcome["versions"].get(name)),
        prompts_hash=hash_string("".join(hashes)) if is_group else hashes[0],
        rows=task.rows,
        chat_template=is_chat,
        lm_eval=importlib.metadata.version("lm_eval"),
    )


def _number_in(documents: Collection[Document], leaves: Sequence[str]) -> int:
    tasks = set(leaves)  # MMLU has 57
    return sum(task in tasks for task, _ in documents)


def _scores(samples: Sequence[Sample], metric: str, filter_name: str) -> list[Any]:
    """One score per document, in order; None for a document without one, and what is not a number unchanged."""
    chosen = sorted((sample for sample in samples if sample["filter"] == filter_name), key=lambda s: s["doc_id"])
    return [_number(sample.get(metric)) for sample in chosen]


def _number(score: Any) -> Any:
    """Numbers, flags and scalars of numpy and torch as ``_finite`` has them; anything else unchanged."""
    try:
        return _finite(score)
    except (TypeError, ValueError):
        return score


def _finite(score: Any) -> float | None:
    """The number; None where there is none, or it is not finite, as with logits that are not: JSON has no NaN."""
    return None if score is None or not math.isfinite(float(score)) else float(score)


def _is_score(score: Any) -> bool:
    return score is None or isinstance(score, float)


def _as_flags(scores: Sequence[Any], value: float | None) -> tuple[bool, ...] | None:
    """The scores as flags, if each is 0 or 1 and ``value`` is the share of ones; otherwise None."""
    if value is None or not scores or not all(score in (0.0, 1.0) for score in scores):
        return None
    return tuple(score == 1.0 for score in scores) if abs(sum(scores) / len(scores) - value) < 1e-9 else None


def _interval(correct: tuple[bool, ...] | None, value: float | None, error: Any) -> tuple[float | None, float | None]:
    if correct is not None:
        rate = wilson(sum(correct), len(correct))
        return rate.low, rate.high
    # "N/A", or 0 where all documents are alike, or not finite.
    if value is None or not isinstance(error, float) or not 0 < error < math.inf:
        return None, None
    margin = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * error
    return value - margin, value + margin


def _prompts_hash(samples: Sequence[Sample]) -> str:
    """As lm-eval computes ``task_hashes``."""
    return hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples))


def _leaves(name: str, members: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group, or the task itself."""
    if name not in members:
        return [name]
    return [leaf for member in members[name] for leaf in _leaves(member, members)]


def _outermost_first(members: Mapping[str, Sequence[str]], leaves: Sequence[str]) -> list[str]:
    """Groups and tasks, each group before its members; every name once."""
    inside = {name for names in members.values() for name in names}

    def walk(name: str) -> Iterator[str]:
        yield name
        for member in members.get(name, ()):
            yield from walk(member)

    roots = [name for name in [*members, *leaves] if name not in inside]
    return list(dict.fromkeys(name for root in roots for name in walk(root)))

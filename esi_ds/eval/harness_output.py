"""What lm-eval says: the numbers of its outcome that are kept, and its talk, most of which is not."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.utils import hash_string
from scipy import stats

from esi_ds.eval.statistics import CONFIDENCE, wilson
from esi_ds.eval.task_result import TaskResult

if TYPE_CHECKING:
    from esi_ds.eval.harness_tasks import Prepared

# Beginnings of warnings about what is done here on purpose, or counted (prompts that are cut).
Sample = dict[str, Any]


def results(outcome: dict[str, Any], item: Prepared, cut: dict[str, set[int]], is_chat: bool) -> list[TaskResult]:
    """Of groups first, each before its members; every metric and filter in the order of the task's definition."""
    found = []
    for name in _outermost_first(outcome["group_subtasks"], list(outcome["samples"])):
        leaves = _leaves(name, outcome["group_subtasks"])
        for key, value in outcome["results"].get(name, {}).items():
            metric, comma, filter_name = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                found.append(_result(outcome, item, cut, is_chat, name, leaves, metric, filter_name, value))
    return found


def _result(
    outcome: dict[str, Any],
    item: Prepared,
    cut: dict[str, set[int]],
    is_chat: bool,
    name: str,
    leaves: Sequence[str],
    metric: str,
    filter_name: str,
    value: float,
) -> TaskResult:
    is_group = list(leaves) != [name]
    scores = [score for leaf in leaves for score in _scores(outcome["samples"][leaf], metric, filter_name)]
    correct = _as_flags(scores, value)
    error = outcome["results"][name].get(f"{metric}_stderr,{filter_name}")
    low, high = _interval(correct, value, error)
    hashes = [_prompts_hash(outcome["samples"][leaf]) for leaf in leaves]
    is_root = name == getattr(item.task, "task_name", getattr(item.task, "name", None))
    return TaskResult(
        task=item.config.name if is_root and not item.is_yaml else name,
        metric=metric,
        filter=filter_name,
        value=float(value),
        n=sum(score is not None for score in scores),
        low=low,
        high=high,
        correct=correct,
        scores=tuple(scores) if correct is None and all(map(_is_score, scores)) else None,
        higher_is_better=outcome["higher_is_better"].get(name, {}).get(metric),
        num_documents=sum(outcome["n-samples"][leaf]["original"] for leaf in leaves),
        num_fewshot=outcome["n-shot"].get(name, 0),
        num_cut=sum(len(cut.get(leaf, ())) for leaf in leaves),
        limit=item.config.limit,
        members=tuple(leaves) if is_group else (),
        version=str(outcome["versions"].get(name)),
        prompts_hash=hash_string("".join(hashes)) if is_group else hashes[0],
        rows=item.rows,
        chat_template=is_chat,
        lm_eval=importlib.metadata.version("lm_eval"),
    )


def _scores(samples: Sequence[Sample], metric: str, filter_name: str) -> list[Any]:
    """One per document, in order; None where the document has none, and what is no number as it is."""
    chosen = sorted((sample for sample in samples if sample["filter"] == filter_name), key=lambda s: s["doc_id"])
    return [_number(sample.get(metric)) for sample in chosen]


def _number(score: Any) -> Any:
    """numpy's and torch's scalars and flags as floats."""
    try:
        return None if score is None else float(score)
    except (TypeError, ValueError):
        return score


def _is_score(score: Any) -> bool:
    return score is None or isinstance(score, float)


def _as_flags(scores: Sequence[Any], value: float) -> tuple[bool, ...] | None:
    """Where the metric is the share of documents that score 1, the others scoring 0."""
    if not scores or not all(score in (0.0, 1.0) for score in scores):
        return None
    return tuple(score == 1.0 for score in scores) if abs(sum(scores) / len(scores) - value) < 1e-9 else None


def _interval(correct: tuple[bool, ...] | None, value: float, error: Any) -> tuple[float | None, float | None]:
    if correct is not None:
        found = wilson(sum(correct), len(correct))
        return found.low, found.high
    if not isinstance(error, float):  # lm-eval writes "N/A"
        return None, None
    margin = float(stats.norm.ppf((1 + CONFIDENCE) / 2)) * error
    return value - margin, value + margin


def _prompts_hash(samples: Sequence[Sample]) -> str:
    """As lm-eval's own task_hashes."""
    return hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples))


def _leaves(name: str, members: dict[str, list[str]]) -> list[str]:
    """The tasks of a group, or the task itself."""
    if name not in members:
        return [name]
    return [leaf for member in members[name] for leaf in _leaves(member, members)]


def _outermost_first(members: dict[str, list[str]], leaves: Sequence[str]) -> list[str]:
    """Groups and tasks, each group before what it holds; every name once."""
    inside = {name for names in members.values() for name in names}

    def walk(name: str) -> Iterator[str]:
        yield name
        for member in members.get(name, ()):
            yield from walk(member)

    roots = [name for name in [*members, *leaves] if name not in inside]
    return list(dict.fromkeys(found for root in roots for found in walk(root)))

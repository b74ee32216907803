"""J of every response, before any gradient, for the estimator that needs only scores (docs/method.md §1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from typing_extensions import NotRequired, TypedDict

from esi_ds.judge.guard import Guard
from esi_ds.reading import json_sha256
from esi_ds.stages.esi.prepare import Example
from esi_ds.stages.interrupt import check_stop
from esi_ds.stages.ledger import Ledger
from esi_ds.tracking import Tracker
from esi_ds.words import counted
from esi_ds.zero import runtime


class JudgeScoreRow(TypedDict):
    """A line of ``judge_scores.jsonl``."""

    index: int  # of the example
    judge_score: float  # J
    tokens: NotRequired[str]  # sha256 of the example's tokens; absent from rows of earlier versions


def judge_scores(
    guard: Guard,
    examples: Sequence[Example],
    batch_size: int,
    file: Path,
    tracker: Tracker,
    save: Callable[[], None] | None,
    description: str,
) -> dict[int, float]:
    """J by example index, the same on every rank. Written to ``file`` batch by batch: no response is judged twice.

    save: what earlier passes have still to save where a signal stops this. description: of the progress. Collectives:
    one broadcast, those of a sharded guard, and two gathers per batch; those of ``save`` then. Raises Interrupted.
    """
    if runtime.is_main():
        file.parent.mkdir(exist_ok=True)
    ledger: Ledger[JudgeScoreRow] = Ledger(file, ("index",), JudgeScoreRow)
    tokens = {example.index: json_sha256({"ids": list(example.ids)}) for example in examples}
    ledger.keep(lambda row: row.get("tokens") in (None, tokens.get(row["index"])))
    waiting = [example for example in examples if (example.index,) not in ledger.rows]
    batch_size = min(batch_size, guard.max_batch or batch_size)
    stride, first = batch_size * runtime.world_size(), batch_size * runtime.rank()
    bar = tracker.progress(
        total=len(examples), initial=len(examples) - len(waiting), unit="prompt", description=description
    )
    with bar:
        for start in range(0, len(waiting), stride):
            mine = waiting[start + first : start + first + batch_size]
            # A rank without an example of its own judges another one and drops the score: the guard may be sharded.
            scores = guard.scores([example.judged for example in mine or waiting[:1]], runtime.device())
            ledger.share(
                JudgeScoreRow(index=example.index, judge_score=score, tokens=tokens[example.index])
                for example, score in zip(mine, scores, strict=False)
            )
            bar.update(len(waiting[start : start + stride]))
            check_stop(f"{counted(len(ledger.rows), 'response')} judged", save)
    return {example.index: ledger.rows[(example.index,)]["judge_score"] for example in examples}

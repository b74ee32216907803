"""Answers of the models under evaluation: greedy, kept on disk as they are made, none made twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from esi_ds.config import Config
from esi_ds.data.prompts import QuestionSet
from esi_ds.eval.fluency import surprises
from esi_ds.eval.verdicts import is_empty
from esi_ds.stages.evaluate.prepare import Candidate
from esi_ds.stages.interrupt import check_stop
from esi_ds.stages.ledger import Key, Ledger
from esi_ds.stages.respond import generate_all
from esi_ds.tracking import Tracker
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.generate import choose_mode, in_step, ready_to_generate

ANSWERS, ANSWER_KEY = "answers.jsonl", ("model", "set", "index")
SURPRISES = "surprises.jsonl"


def answer_keys(names: Sequence[str], sets: Sequence[QuestionSet]) -> list[Key]:
    """(model, set, index) of every answer there is to make, in the order of the tables."""
    return [(name, found.name, index) for name in names for found in sets for index in range(len(found.prompts))]


def answer_all(
    model: ShardedModel,
    name: str,
    candidate: Candidate,
    sets: Sequence[QuestionSet],
    answers: Ledger,
    config: Config,
    tracker: Tracker,
) -> None:
    """A row for every prompt of every set that ``answers`` lacks, under ``name``; response None where there is no room.

    Data-parallel over ranks. Collectives: those of generation, and one gather of texts a batch. Raises Interrupted.
    """
    limit, length = candidate.max_positions, config.eval.max_new_tokens
    waiting: list[dict[str, Any]] = []
    for found in sets:
        for index, prompt in enumerate(found.prompts):
            row = {"model": name, "set": found.name, "index": index, "prompt": prompt, "response": None}
            num_tokens = len(candidate.prompt_ids[found.name, index])
            if answers.key(row) in answers.rows:
                continue
            if limit is not None and num_tokens + length > limit:
                reason = f"no room for an answer ({num_tokens} + {length} tokens, the model takes {limit})"
                answers.add([{**row, "excluded": reason}])
            else:
                waiting.append(row)

    def keep(new: dict[int, str]) -> None:
        answers.add({**waiting[number], "response": text, "excluded": None} for number, text in new.items())

    generate_all(
        model,
        candidate.tokenizer,
        [candidate.prompt_ids[row["set"], row["index"]] for row in waiting],
        {},
        limit=None,
        max_new_tokens=length,
        batch_size=config.eval.batch_size,
        generation=config.esi.generation,
        keep=keep,
        tracker=tracker,
        description=f"answer: {name}"[:40],
    )


def surprise_all(
    model: ShardedModel, reference: Candidate, answers: Ledger, found: Ledger, config: Config, tracker: Tracker
) -> None:
    """How surprised the reference model is by every answer that ``found`` has no row for.

    Only where the whole model fits on a rank: cut over the ranks it is left out, and incoherence judged by form alone.
    Collectives: a gather of the model, a gather of numbers a batch. Raises Interrupted.
    """
    rows = [row for key, row in answers.rows.items() if key not in found.rows and not is_empty(row["response"] or "")]
    if not rows:
        return
    mode, reason = choose_mode(model, config.esi.generation)
    if in_step(model, mode):
        reason = "experts are on different ranks" if model.expert_parallel else reason
        tracker.log(f"incoherence is judged by form alone: {reason}")
        return
    ranks, rank = runtime.world_size(), runtime.rank()
    size = config.eval.batch_size * 4  # texts of like length find each other among so many
    bar = tracker.progress(total=len(rows), initial=0, unit="answer", description="surprise")
    with ready_to_generate(model, mode), bar:
        for start in range(0, len(rows), size * ranks):
            mine = rows[start + rank * size : start + (rank + 1) * size]
            values = surprises(
                model.module,
                reference.tokenizer,
                [(row["prompt"], row["response"]) for row in mine],
                system_prompt=config.model.system_prompt,
                batch_size=config.eval.batch_size,
            )
            found.share(
                {**{field: row[field] for field in ANSWER_KEY}, "surprise": value}
                for row, value in zip(mine, values, strict=True)
            )
            bar.update(min(size * ranks, len(rows) - start))
            check_stop(f"{len(found.rows)} answers read again")

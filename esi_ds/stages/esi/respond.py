"""ESI's responses: read from a file, or generated and written batch by batch, so that none is generated twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typing_extensions import NotRequired

from esi_ds.config import Config
from esi_ds.data.asked import changes_the_prompt
from esi_ds.data.chat import answerable
from esi_ds.data.thoughts import marks_with
from esi_ds.data.turns import Prompt
from esi_ds.errors import UserError
from esi_ds.journal import Journal
from esi_ds.models.folder import max_positions
from esi_ds.stages.batch_sizes import GenerationBatch
from esi_ds.stages.esi.prepare import PromptInputs, asked_with
from esi_ds.stages.respond import GeneratedRow, by_index, generate_all, keep_in
from esi_ds.tracking import Tracker
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel

PARTIAL_NAME = "responses.partial.jsonl"
NAME = "responses.jsonl"  # both with the prefix of the objective (``PromptInputs.prefix``)


class ResponseRow(GeneratedRow):
    """A line of ``responses.jsonl``."""

    prompt: Prompt
    judge_score: float | None  # None before it is judged, and of an excluded prompt
    excluded: str | None  # why the prompt took no part; None if it did
    goal: NotRequired[str]  # what the prompt is after, where an attack's rows say so: the judge has read it instead
    asked: NotRequired[dict[str, Any]]  # what besides the prompt decided the response (``data.asked``)


def write_responses(
    folder: Path,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    scores: dict[int, float],
    excluded: dict[int, str],
    goals: Sequence[str | None] | None = None,
    prefix: str = "",
    asked: dict[str, Any] | None = None,
) -> None:
    """``responses.jsonl`` (docs/design.md §7). goals: one per prompt, if any. prefix: of its name. asked: of each row.
    Rank 0 only."""
    rows: list[ResponseRow] = [
        {
            "index": index,
            "prompt": prompt,
            "response": response,
            "judge_score": scores.get(index),
            "excluded": excluded.get(index),
        }
        for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    if goals is not None:
        rows = [row if goal is None else {**row, "goal": goal} for row, goal in zip(rows, goals, strict=True)]
    if asked is not None and changes_the_prompt(asked):
        rows = [{**row, "asked": asked} for row in rows]
    Journal(folder / f"{prefix}{NAME}", ResponseRow).replace(rows)


def responses_on_disk(folder: Path, prompts: Sequence[Prompt], prefix: str = "") -> dict[int, str]:
    """index → response of everything that earlier starts of this run have generated.

    Raises UserError for rows that the run did not write, or that answer other prompts.
    """
    file = folder / f"{prefix}{NAME}"
    if not file.is_file():
        return by_index(Journal(folder / f"{prefix}{PARTIAL_NAME}", GeneratedRow))
    rows = Journal(file, ResponseRow).read()
    if [(row["index"], row["prompt"]) for row in rows] != list(enumerate(prompts)):
        raise UserError(
            "run.output_dir", str(file), "does not answer the prompts of this run", "give a new run.output_dir"
        )
    return {row["index"]: row["response"] for row in rows}


def respond(
    config: Config,
    inputs: PromptInputs,
    model: ShardedModel,
    prompt_ids: Sequence[list[int] | str],
    folder: Path,
    batch: GenerationBatch,
    tracker: Tracker,
) -> list[str]:
    """One response per prompt, the same list on every rank; "" for a prompt that cannot be answered.

    Collectives: those of ``generate_all``, and one broadcast of the texts on disk.
    """
    if inputs.data.responses is not None:
        return inputs.data.responses
    prompts, prefix, partial = inputs.data.prompts, inputs.prefix, folder / f"{inputs.prefix}{PARTIAL_NAME}"
    done = runtime.from_main(lambda: responses_on_disk(folder, prompts, prefix))
    limit, length = max_positions(inputs.model_config), config.esi.max_new_tokens
    generate_all(
        model,
        inputs.tokenizer,
        inputs.end_ids,
        answerable(dict(enumerate(prompt_ids)), length, limit)[0],
        done,
        max_new_tokens=length,
        batch=batch,
        generation=config.esi.generation,
        keep=keep_in(Journal(partial, GeneratedRow)),
        tracker=tracker,
        marks=marks_with(config.model.thought_marks),
        description=f"{prefix}generate",
    )
    responses = [done.get(index, "") for index in range(len(prompt_ids))]
    if runtime.is_main():
        if not (folder / f"{prefix}{NAME}").is_file():
            asked = asked_with(config, inputs.data)
            write_responses(folder, prompts, responses, {}, {}, inputs.data.goals, prefix, asked)
        partial.unlink(missing_ok=True)
    return responses

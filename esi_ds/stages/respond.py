"""Responses: read from a file, or generated and written batch by batch, so that none is generated twice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from typing_extensions import TypedDict

from esi_ds.config import Config
from esi_ds.data.asked import changes_the_prompt
from esi_ds.data.chat import answerable
from esi_ds.data.thoughts import MARKS, Marks, marks_with
from esi_ds.data.turns import Prompt
from esi_ds.errors import Interrupted, UserError
from esi_ds.journal import Journal
from esi_ds.models.folder import max_positions
from esi_ds.stages.batch_sizes import GenerationBatch
from esi_ds.stages.esi.prepare import PromptInputs, asked_with
from esi_ds.stages.interrupt import stop_requested
from esi_ds.tracking import Tracker
from esi_ds.words import counted
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.generate import Draws, choose_batches, choose_mode, generate, in_step, ready_to_generate

PARTIAL_NAME = "responses.partial.jsonl"
NAME = "responses.jsonl"  # both with the prefix of the objective (``PromptInputs.prefix``)


class GeneratedRow(TypedDict):
    """A line of a file of responses that is being filled."""

    index: int  # of the prompt
    response: str


class _Attack(TypedDict, total=False):
    goal: str  # what the prompt is after, where the rows of an attack say so: the judge has read it instead
    asked: dict[str, Any]  # what besides the prompt decided the response (``data.asked``)


class ResponseRow(GeneratedRow, _Attack):
    """A line of ``responses.jsonl``."""

    prompt: Prompt
    judge_score: float | None  # None before it is judged, and of an excluded prompt
    excluded: str | None  # why the prompt took no part; None if it did


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


def by_index(journal: Journal[GeneratedRow]) -> dict[int, str]:
    """index → response of a file that is being filled. Raises UserError for rows that the run did not write."""
    return {row["index"]: row["response"] for row in journal.read()}


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


def keep_in(journal: Journal[GeneratedRow]) -> Callable[[dict[int, str]], None]:
    """A function for ``generate_all``: rank 0 adds responses to a file that is being filled."""

    def keep(new: dict[int, str]) -> None:
        if runtime.is_main():
            journal.append([{"index": index, "response": text} for index, text in new.items()])

    return keep


def generate_all(
    model: ShardedModel,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Collection[int],
    prompt_ids: Mapping[int, list[int]],
    done: dict[int, str],
    *,
    max_new_tokens: int,
    batch: GenerationBatch,
    generation: str,
    keep: Callable[[dict[int, str]], None],
    tracker: Tracker,
    description: str = "generate",
    marks: Marks = MARKS,
    draws: Callable[[Sequence[int]], Draws] | None = None,
) -> None:
    """Add a response to ``done`` for every prompt that has none.

    prompt_ids: of prompts with room for ``max_new_tokens``, by index. end_ids: the tokens that end a response. marks:
    of thoughts. draws: how those of some indices are sampled; None decodes greedily. All ranks take part, batch by
    batch; after each batch every rank calls ``keep`` with the responses of all ranks. Collectives: those of generation,
    and one gather of texts per batch. Raises Interrupted.
    """
    waiting = [index for index in prompt_ids if index not in done]
    if not waiting:
        return
    mode, reason = choose_mode(model, generation)
    tracker.log(f"generating {counted(len(waiting), 'response')}, model {mode.replace('_', ' ')}: {reason}")
    lengths = {index: len(prompt_ids[index]) for index in waiting}
    ranks, rank = runtime.world_size(), runtime.rank()
    progress = tracker.progress(
        total=len(prompt_ids), initial=len(prompt_ids) - len(waiting), unit="prompt", description=description
    )
    with ready_to_generate(model, mode), progress:
        batch_size = batch.rows(model, mode, max_new_tokens)
        if batch.size.note:
            tracker.log(f"generating {batch.size.note}")
        batches, note = choose_batches(model, tokenizer, lengths, batch_size, mode, max_new_tokens)
        if note:
            tracker.remark(note)
        for start in range(0, len(batches), ranks):
            mine = batches[start + rank] if start + rank < len(batches) else []
            # A rank without a prompt left repeats one: all ranks must run in step.
            indices = mine or waiting[:1]
            texts, tokens = list[str](), 0
            if mine or in_step(model, mode):
                rows, drawn = [prompt_ids[index] for index in indices], draws and draws(indices)
                texts, tokens = generate(model, tokenizer, rows, max_new_tokens, mode, end_ids, marks, drawn)
            local = dict(zip(mine, texts, strict=False)), tokens if mine else 0, stop_requested()
            gathered = runtime.gather_objects(local)
            new = {index: text for part, _, _ in gathered for index, text in part.items()}
            done.update(new)
            keep(new)
            progress.advance(len(new), sum(count for _, count, _ in gathered))
            if any(signalled for _, _, signalled in gathered):
                raise Interrupted(
                    f"stopped by a signal with {counted(len(done), 'response')} generated; start again to continue"
                )

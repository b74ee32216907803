"""Responses that a model generates batch by batch and a stage writes as they come, so that none is generated twice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from transformers import PreTrainedTokenizerBase
from typing_extensions import TypedDict

from esi_ds.data.thoughts import MARKS, Marks
from esi_ds.errors import Interrupted
from esi_ds.journal import Journal
from esi_ds.stages.batch_sizes import GenerationBatch
from esi_ds.stages.interrupt import stop_requested
from esi_ds.tracking import Tracker
from esi_ds.words import counted
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.generate import Draws, Generated, choose_batches, choose_mode, generate, in_step, ready_to_generate

SECONDS_A_TOKEN = 0.1  # of a large model on a GPU with a long cache; arithmetic, not measured


class GeneratedRow(TypedDict):
    """A line of a file of responses that is being filled."""

    index: int  # of the prompt
    response: str


def by_index(journal: Journal[GeneratedRow]) -> dict[int, str]:
    """index → response of a file that is being filled. Raises UserError for rows that the run did not write."""
    return {row["index"]: row["response"] for row in journal.read()}


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
    cut: set[int] | None = None,
) -> None:
    """Add a response to ``done`` for every prompt that has none.

    prompt_ids: of prompts with room for ``max_new_tokens``, by index. end_ids: the tokens that end a response. marks:
    of thoughts. draws: how those of some indices are sampled; None decodes greedily. cut: filled with the indices of
    responses that end at ``max_new_tokens``. All ranks take part, batch by batch; after each batch every rank calls
    ``keep`` with the responses of all ranks. Collectives: those of generation, and one gather of texts per batch.
    Raises Interrupted.
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
        batches = _plan_batches(model, tokenizer, lengths, mode, max_new_tokens, batch, tracker)
        for start in range(0, len(batches), ranks):
            mine = batches[start + rank] if start + rank < len(batches) else []
            # A rank without a prompt left repeats one: all ranks must run in step.
            indices = mine or waiting[:1]
            texts, tokens, are_cut = Generated([], 0, [])
            if mine or in_step(model, mode):
                rows, drawn = [prompt_ids[index] for index in indices], draws and draws(indices)
                texts, tokens, are_cut = generate(model, tokenizer, rows, max_new_tokens, mode, end_ids, marks, drawn)
            local = list(zip(mine, texts, are_cut, strict=False)), tokens if mine else 0, stop_requested()
            gathered = runtime.gather_objects(local)
            responses = [response for part, _, _ in gathered for response in part]
            new = {index: text for index, text, _ in responses}
            if cut is not None:
                cut.update(index for index, _, is_cut in responses if is_cut)
            done.update(new)
            keep(new)
            progress.advance(len(new), sum(count for _, count, _ in gathered))
            if any(signalled for _, _, signalled in gathered):
                number = counted(len(done), "response")
                raise Interrupted(f"stopped by a signal with {number} generated; start again to continue")


def _plan_batches(
    model: ShardedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Mapping[int, int],
    mode: str,
    max_new_tokens: int,
    batch: GenerationBatch,
    tracker: Tracker,
) -> list[list[int]]:
    """Indices of prompts that are answered together, and what log and report say of them. lengths: of the prompts."""
    batch_size = batch.rows(model, mode, max_new_tokens)
    if batch.size.note:
        tracker.log(f"generating {batch.size.note}")
    batches, note = choose_batches(model, tokenizer, lengths, batch_size, mode, max_new_tokens)
    if note:
        tracker.remark(note)
    if not in_step(model, mode) and (note := waiting_note(max_new_tokens)):
        tracker.log(note)
    return batches


def waiting_note(max_new_tokens: int) -> str | None:
    """For the log, where ranks whose responses are short may wait for a long one until their collective gives up."""
    limit, longest = runtime.collective_timeout_s(), SECONDS_A_TOKEN * max_new_tokens
    if runtime.world_size() == 1 or longest < limit:
        return None
    return (
        f"a response of {max_new_tokens:,} tokens may take {longest:,.0f} s, and a rank that is done waits for the "
        f"others for {limit:,.0f} s at most: raise run.collective_timeout_s if that is too short, also on a restart"
    )

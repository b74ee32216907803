"""Greedy or sampled responses from a ZeRO-3 model: gathered once where it fits, otherwise again for every token."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from esi_ds.core.batch import TokenRows, cut_by_length, left_pad
from esi_ds.core.batch_size import WHOLE_SHARE
from esi_ds.data.thoughts import MARKS, Marks, decode_responses
from esi_ds.models.decoding import Sampling, greedy_ids, sampled_ids
from esi_ds.models.rows import (
    Together,
    alike_up_to,
    difference_beside,
    frequencies_note,
    generation_logits,
    probe_ids,
)
from esi_ds.zero import runtime
from esi_ds.zero.batching import of_all_ranks
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.memory import tightest_free_bytes


def choose_mode(model: ShardedModel, mode: str) -> tuple[str, str]:
    """(``gathered`` or ``per_token``, the reason). One all-reduce: the rank with the least free memory decides.

    mode: ``esi.generation``.
    """
    size = sum(layout.numel * model.by_name[layout.name].element_size() for layout in model.layouts)
    free = tightest_free_bytes()
    fits = size <= WHOLE_SHARE * free
    what = "the model without other ranks' experts" if model.expert_parallel else "the whole model"
    reason = f"{what} takes {size / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free on the tightest rank"
    if mode == "auto":
        return ("gathered" if fits else "per_token"), reason
    return mode, f"set by esi.generation; {reason}"


def in_step(model: ShardedModel, mode: str) -> bool:
    """Whether every token needs all ranks: to gather weights, or to reach experts on other ranks."""
    return mode == "per_token" or model.expert_parallel


@contextmanager
def ready_to_generate(model: ShardedModel, mode: str) -> Iterator[None]:
    """Context for ``generate``. With ``gathered`` the whole model is on every rank: one all-gather of the model."""
    with model.with_cache():
        if mode == "gathered":
            with model.whole_for_generation():
                yield
        else:
            yield
            model.release()


class Draws(NamedTuple):
    """How the rows of a batch are sampled. keys: of each row's noise (``core.noise.stream``)."""

    sampling: Sampling
    keys: Sequence[int]


class Generated(NamedTuple):
    """Responses to a batch, how many tokens they have together, end tokens not counted, and which were cut at their
    longest length."""

    texts: list[str]
    num_tokens: int
    are_cut: list[bool]


def generate(
    model: ShardedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[list[int]],
    max_new_tokens: int,
    mode: str,
    end_ids: Collection[int],
    marks: Marks = MARKS,
    draws: Draws | None = None,
) -> Generated:
    """Responses to a batch of prompts, given as token ids; text without special tokens but ``marks``.

    end_ids: the tokens that end a response. draws: None decodes greedily. Collectives where ranks go ``in_step``: those
    of a forward pass per token, until every rank has finished; every rank must then call this equally often, with at
    least one row.
    """
    batch, decode = left_pad(rows, tokenizer.pad_token_id, runtime.device()), greedy_ids
    if draws is not None:
        decode = partial(sampled_ids, sampling=draws.sampling, keys=draws.keys)
    responses = decode(
        model.module,
        batch,
        end_ids=end_ids,
        pad_id=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens,
        synced_gpus=in_step(model, mode),
    )
    lengths = [len(response) for response in responses]
    are_cut = [length == max_new_tokens for length in lengths]
    return Generated(decode_responses(tokenizer, responses, marks), sum(lengths), are_cut)


def choose_batches(
    model: ShardedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Mapping[int, int],
    batch_size: int,
    mode: str,
    max_new_tokens: int,
) -> tuple[list[list[int]], str | None]:
    """Prompts' numbers cut into batches, and where they are not cut in order, a sentence for the log on why.

    lengths: number of each prompt → its tokens. Every rank gets the same batches. Collectives: those of
    ``may_stand_together``, where it has not been asked of this model.
    """
    together = may_stand_together(model, tokenizer, mode) if batch_size > 1 and len(lengths) > 1 else Together.ANY
    if together is Together.NONE:
        note = "one prompt a batch: an answer would depend on the prompts beside it"
        return cut_by_length(lengths, 1, None), f"{note}, its first logits by {model.beside}"
    limit = alike_up_to(model.module.config)
    longest = None if limit is None else limit - max_new_tokens
    if together is Together.ANY:
        batches = cut_by_length(lengths, batch_size, longest)
        if limit is None or batch_size == 1 or max(lengths.values()) + max_new_tokens <= limit:
            return batches, None
        return batches, f"a prompt that may become so long has a batch of its own: {frequencies_note(limit)}"
    by_length: dict[int, dict[int, int]] = {}
    for number in sorted(lengths, key=lambda number: lengths[number]):
        by_length.setdefault(lengths[number], {})[number] = lengths[number]
    batches = [batch for alike in by_length.values() for batch in cut_by_length(alike, batch_size, longest)]
    note = "only prompts of equal length share a batch: an answer would depend on padding"
    return batches, f"{note}, its first logits by {model.beside}"


def may_stand_together(model: ShardedModel, tokenizer: PreTrainedTokenizerBase, mode: str) -> Together:
    """Which prompts may share a batch, from the first logits of generation; asked once of each model.

    To be called inside ``ready_to_generate``. Collectives: those of four short generations at most, and two
    all-reduces.
    """

    def read(rows: TokenRows) -> Tensor:
        return generation_logits(model.module, rows, tokenizer.pad_token_id, in_step(model, mode))

    if model.together is None:
        ids = probe_ids(tokenizer)
        model.beside = of_all_ranks(difference_beside(read, ids))
        if model.beside.is_rounding:
            model.together = Together.ANY
        else:
            alike = of_all_ranks(difference_beside(read, ids, equal_length=True))
            model.together = Together.EQUAL_LENGTH if alike.is_rounding else Together.NONE
    return model.together

"""Greedy responses from a ZeRO-3 model, which is gathered once where it fits, otherwise again for every token."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedTokenizerBase

from esi_ds.core.batch import left_pad
from esi_ds.data.thoughts import decode_responses
from esi_ds.models.decoding import greedy_ids
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel

FILL = 0.8  # share of the free memory that the whole model may take during generation


def choose_mode(model: ShardedModel, mode: str) -> tuple[str, str]:
    """(``gathered`` or ``per_token``, the reason). One all-reduce: the rank with the least free memory decides.

    mode: ``esi.generation``.
    """
    size = sum(layout.numel * model.by_name[layout.name].element_size() for layout in model.layouts)
    free = -runtime.all_reduce_max(torch.tensor([-float(runtime.free_memory_bytes())], dtype=torch.float64)).item()
    fits = size <= FILL * free
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


def generate(
    model: ShardedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[list[int]],
    max_new_tokens: int,
    mode: str,
    end_ids: Collection[int],
) -> list[str]:
    """Greedy responses to a batch of prompts, given as token ids; text without special tokens but marks of thoughts.

    end_ids: the tokens that end a response. Collectives where ranks go ``in_step``: those of a forward pass per token,
    until every rank has finished; every rank must then call this equally often, with at least one row.
    """
    batch = left_pad(rows, tokenizer.pad_token_id, runtime.device())
    batch.pop("position_ids")  # generate() derives the same ones from the attention mask
    responses = greedy_ids(
        model.module,
        batch,
        end_ids=end_ids,
        pad_id=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens,
        synced_gpus=in_step(model, mode),
    )
    return decode_responses(tokenizer, responses)

"""Greedy decoding: the most probable token at every step, and nothing that a model's own defaults add to that."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel


@contextmanager
def without_defaults(model: PreTrainedModel, end_ids: Collection[int], pad_id: int) -> Iterator[None]:
    """Inside the block ``model.generate`` inherits nothing from generation_config.json but ``end_ids``.

    transformers fills every setting that a caller leaves open from ``model.generation_config``: penalties, beams,
    suppressed tokens, time limits. Remote code may also have put a ``generate`` of its own on the model.
    """
    defaults, custom = model.generation_config, vars(model).pop("generate", None)
    model.generation_config = _settings(end_ids, pad_id)
    try:
        yield
    finally:
        model.generation_config = defaults
        if custom is not None:
            vars(model)["generate"] = custom


def _settings(end_ids: Collection[int], pad_id: int, **more: Any) -> GenerationConfig:
    return GenerationConfig(eos_token_id=sorted(end_ids) or None, pad_token_id=pad_id, **more)


def greedy_ids(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    *,
    end_ids: Collection[int],
    pad_id: int,
    max_new_tokens: int,
    synced_gpus: bool = False,
) -> list[list[int]]:
    """The new ids of each row, without its end token and what follows it.

    batch: ``input_ids`` and ``attention_mask``, both int64 [rows, tokens] and padded on the left. synced_gpus: whether
    ranks go in step, with a forward pass each until all have finished.
    """
    settings = _settings(end_ids, pad_id, do_sample=False, max_new_tokens=max_new_tokens, use_cache=True)
    generator: Any = model  # typed without the mixin that ``generate`` comes from
    with torch.no_grad(), without_defaults(model, end_ids, pad_id):
        generated = generator.generate(**batch, generation_config=settings, synced_gpus=synced_gpus)
    width = batch["input_ids"].shape[1]
    return [up_to_end(row, end_ids) for row in generated[:, width:].tolist()]


def up_to_end(ids: list[int], end_ids: Collection[int]) -> list[int]:
    """``ids`` before the first end token; all of them if there is none."""
    return ids[: next((index for index, token in enumerate(ids) if token in end_ids), len(ids))]

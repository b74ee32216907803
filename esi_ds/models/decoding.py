"""Greedy and sampled decoding, without anything that a model's own defaults add to them.

Greedy takes the most probable token at every step. A sampled row takes the largest of logits / temperature plus Gumbel
noise, among the tokens that top-p leaves, which is a draw from their softmax (Gumbel 1954, in Maddison et al.,
NeurIPS 2014). The noise depends on the row's own key and the step alone, so that a row's tokens do not depend on the
rows beside it, on ranks or on restarts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, TopPLogitsWarper

from esi_ds.core.noise import GPU_CHUNK, gumbel

DECODING_CONTEXT = "_optimize_model_for_decode"  # transformers' context of all steps but the prompt's


@contextmanager
def without_defaults(model: PreTrainedModel, end_ids: Collection[int], pad_id: int) -> Iterator[None]:
    """Inside the block ``model.generate`` inherits nothing from generation_config.json but ``end_ids``.

    transformers fills every setting that a caller leaves open from ``model.generation_config``: penalties, beams,
    suppressed tokens, time limits. Remote code may also have put a ``generate`` of its own on the model. And on GPUs
    transformers switches the experts' kernel after the prompt, for one that copies the matrices of each row's experts:
    45 GB for 64 rows of Mixtral-8x7B, where all experts of a layer have 2.8 GB. Experts keep the prompt's kernel here.
    transformers calls the other one faster for a few rows; its speed was not measured here. Blocks may be nested.
    """
    defaults = model.generation_config
    own = {name: vars(model).pop(name) for name in ("generate", DECODING_CONTEXT) if name in vars(model)}
    model.generation_config = _settings(end_ids, pad_id)
    vars(model)[DECODING_CONTEXT] = nullcontext
    try:
        yield
    finally:
        vars(model).pop(DECODING_CONTEXT, None)
        vars(model).update(own)
        model.generation_config = defaults


def _settings(end_ids: Collection[int], pad_id: int, **more: Any) -> GenerationConfig:
    return GenerationConfig(eos_token_id=sorted(end_ids) or None, pad_token_id=pad_id, **more)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature: above 0. top_p: the probability that the tokens drawn from hold together."""

    temperature: float
    top_p: float = 1.0


class _Draw(LogitsProcessor):
    """Scores whose largest is the token drawn. keys: int64 [rows], each row's noise; width: tokens of the prompts."""

    def __init__(self, sampling: Sampling, keys: Tensor, width: int):
        self._temperature, self._keys, self._width = sampling.temperature, keys, width
        self._top_p = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float() / self._temperature
        if self._top_p is not None:
            scores = self._top_p(input_ids, scores)
        rows, num_tokens = scores.shape
        steps = torch.full((rows,), input_ids.shape[1] - self._width, device=scores.device)
        size = max(1, GPU_CHUNK // num_tokens)  # rows at a time: the noise takes eight bytes a token, several times
        for part, keys, numbers in zip(scores.split(size), self._keys.split(size), steps.split(size), strict=True):
            part += gumbel(keys, numbers, num_tokens)
        return scores


def sampled_ids(
    model: PreTrainedModel, batch: Mapping[str, Tensor], *, sampling: Sampling, keys: Sequence[int], **settings: Any
) -> list[list[int]]:
    """``greedy_ids``, with the tokens drawn at random. keys: int64, of each row's noise (``core.noise.stream``)."""
    ids = batch["input_ids"]
    draw = _Draw(sampling, torch.tensor(keys, dtype=torch.int64, device=ids.device), ids.shape[1])
    return greedy_ids(model, batch, processors=[draw], **settings)


def greedy_ids(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    *,
    end_ids: Collection[int],
    pad_id: int,
    max_new_tokens: int,
    synced_gpus: bool = False,
    processors: Sequence[LogitsProcessor] = (),
) -> list[list[int]]:
    """The new ids of each row, without its end token and what follows it.

    batch: ``input_ids`` and ``attention_mask``, both int64 [rows, tokens] and padded on the left. synced_gpus: whether
    ranks go in step, with a forward pass each until all have finished. processors: of the scores, before the largest is
    taken.
    """
    settings = _settings(end_ids, pad_id, do_sample=False, max_new_tokens=max_new_tokens, use_cache=True)
    generator: Any = model  # typed without the mixin that ``generate`` comes from
    with torch.no_grad(), without_defaults(model, end_ids, pad_id):
        generated = generator.generate(
            **batch, generation_config=settings, synced_gpus=synced_gpus, logits_processor=list(processors)
        )
    width = batch["input_ids"].shape[1]
    return [up_to_end(row, end_ids) for row in generated[:, width:].tolist()]


def up_to_end(ids: list[int], end_ids: Collection[int]) -> list[int]:
    """``ids`` before the first end token; all of them if there is none."""
    return ids[: next((index for index, token in enumerate(ids) if token in end_ids), len(ids))]

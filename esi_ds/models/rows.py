"""Rows of token ids in one forward pass: the logits wanted of them, and whether a row's result is its own.

Models differ in what they do with padding. RWKV and RecurrentGemma read it as text, BART counts positions from the
left edge of the batch, experts with a limited capacity drop tokens because of other rows' tokens. No list of
architectures says which: two forward passes on a short row do. What only long rows show, the configuration says
(``alike_up_to``).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from esi_ds.core.batch import TokenRows, left_pad
from esi_ds.errors import UserError
from esi_ds.models.decoding import without_defaults
from esi_ds.models.roles import layer_configs

PROBE_TEXT = "What is the capital of France, and how many people live there?"
PROBE_LENGTH, PROBE_REPEATS = 8, 4  # tokens of the probe's row; how many times it stands beside itself
# Relative L2 distance of logits that is still rounding. Other shapes add up in another order, which layers amplify: by
# 2e-4 at most over all architectures in float32 (docs/architectures.md), a few units of the last place in the others.
# Padding that is read as text moves logits by a tenth and more. A wrong alarm costs time, not correctness.
ROUNDING = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class Together(Enum):
    """Which rows may share a batch without changing each other's results."""

    ANY, EQUAL_LENGTH, NONE = "any", "of equal length", "none"


Read = Callable[[TokenRows], Sequence[Tensor] | Tensor]  # rows in one batch → each row's result


class Difference(NamedTuple):
    """Between two results that would be equal but for rounding. distance: L2, relative to the first of them. limit: of
    ``ROUNDING``."""

    distance: float
    limit: float

    @property
    def is_rounding(self) -> bool:
        return self.distance <= self.limit

    def __str__(self) -> str:
        return f"{self.distance:.2g} of their norm (up to {self.limit:g} is taken for rounding)"


def alike_up_to(config: PretrainedConfig) -> int | None:
    """How many tokens a row may have that never changes how the rows beside it are read; None: any number.

    LongRoPE (Phi-3-mini-128k, Phi-4-mini) has two sets of frequencies, of which transformers takes one for the whole
    batch, by its longest position; no short probe meets the second. Dynamic NTK's change beyond ``max_positions`` only,
    and longer rows are never read.
    """
    limits = [
        section.get("original_max_position_embeddings")
        for layer in layer_configs(config.get_text_config())
        for section in _rotary_sections(getattr(layer, "rope_parameters", None) or {})
        if section.get("rope_type") == "longrope"
    ]
    return min((limit for limit in limits if limit), default=None)


def beside_note(difference: Difference) -> str:
    """What a ``difference_beside`` that is more than rounding means, for logs and messages."""
    return f"a row's logits depend on the rows beside it, by {difference}"


def ahead_note(difference: Difference) -> str:
    """Likewise of a ``difference_ahead``."""
    return f"its logits of earlier tokens depend on later ones, by {difference}"


def frequencies_note(limit: int) -> str:
    """Why rows of more than ``alike_up_to`` tokens are read alone, for the log."""
    return f"beyond {limit:,} tokens its rotary frequencies change, for all rows of a batch"


def _rotary_sections(parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """``rope_parameters`` themselves, or those of each type of layer."""
    return [parameters, *(section for section in parameters.values() if isinstance(section, Mapping))]


def accepted(model: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that the model's forward pass takes."""
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(options)
    return {name: value for name, value in options.items() if name in parameters}


def last_logits(
    model: nn.Module, batch: Mapping[str, Tensor], count: int, forward: Callable[..., Any] | None = None
) -> Tensor:
    """Logits [B, count, V] of the last ``count`` positions of a causal model, in its dtype.

    Only those are computed where the architecture can. Some take ``logits_to_keep`` and ignore it (ProphetNet, TrOCR,
    Whisper, xLSTM). forward: what is called instead of ``model``, such as its engine. Raises UserError where neither
    these logits nor those of all positions come back. Collectives: those of a forward pass.
    """
    width = batch["input_ids"].shape[1]
    logits = _kept_logits(model, batch, count, count, f"the last {count}", forward)
    return logits[:, width - count :] if logits.shape[1] > count else logits


def end_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits [B, V] of each row's last token, in the model's dtype. batch: of ``right_pad``. As ``last_logits``.

    Those of every position where some row ends are computed, B at most. If the architecture takes no list of positions,
    all positions from the shortest row's end on are computed.
    """
    ends = batch["attention_mask"].sum(1) - 1
    width, rows = batch["input_ids"].shape[1], torch.arange(len(ends), device=ends.device)
    kept, of_row = ends.unique(return_inverse=True)
    if len(kept) == 1 or not takes_positions(model):
        first = int(kept[0])
        return last_logits(model, batch, width - first)[rows, ends - first]
    logits = _kept_logits(model, batch, kept, len(kept), f"{len(kept)} positions")
    return logits[rows, of_row if logits.shape[1] == len(kept) else ends]


def takes_positions(model: nn.Module) -> bool:
    """Whether ``logits_to_keep`` may be a tensor of positions, as the architecture's signature says. It decides for all
    ranks alike; code of a model's own often takes a number alone."""
    parameter = inspect.signature(model.forward).parameters.get("logits_to_keep")
    return parameter is not None and "Tensor" in str(parameter.annotation)


def _kept_logits(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    kept: int | Tensor,
    count: int,
    what: str,
    forward: Callable[..., Any] | None = None,
) -> Tensor:
    """Logits of the ``count`` positions that ``kept`` says, or of all."""
    width = batch["input_ids"].shape[1]
    options = accepted(model, {**batch, "use_cache": False, "logits_to_keep": kept})
    logits: Tensor = (forward or model)(**options).logits
    if logits.shape[1] not in (count, width):
        raise UserError(
            "path",
            getattr(model, "name_or_path", type(model).__name__),
            f"gives logits of {logits.shape[1]} positions where those of {what} of {width} were asked for",
            "use a causal language model that gives one row of logits for each token",
        )
    return logits


def difference_beside(read: Read, ids: Sequence[int], equal_length: bool = False) -> Difference:
    """How much a row's result changes with the rows beside it: a longer one, or some of ``equal_length``. Two calls of
    ``read``.

    ids: any text's. The other rows come first and say the same, so that experts with a capacity are full when the
    probe's tokens arrive.
    """
    row = _probe_row(ids)
    others = [row] * PROBE_REPEATS if equal_length else [row * PROBE_REPEATS]
    return _difference(read([row])[0], read([*others, row])[-1])


def difference_ahead(read: Read, ids: Sequence[int]) -> Difference:
    """How much a row's results [L, V] at earlier tokens change with another last token, or with more text behind it: a
    causal model's do not, ProphetNet's do. Three calls of ``read``."""
    row = _probe_row(ids)
    last = next((token for token in row if token != row[-1]), 0 if row[-1] else 1)
    earlier = len(row) - 1
    expected = read([row])[0][:earlier]
    others = [*row[:-1], last], row * PROBE_REPEATS
    return max(_difference(expected, read([other])[0][:earlier]) for other in others)


def generation_logits(model: PreTrainedModel, rows: TokenRows, pad: int, synced_gpus: bool = False) -> Tensor:
    """Logits [B, 2, V] of two steps of generation, in the model's dtype: of the prompt, and of its last token, read
    again with what the prompt left in the cache (the likeliest may depend on rounding). synced_gpus: as for
    ``greedy_ids``."""
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=2, pad_token_id=pad, output_logits=True, return_dict_in_generate=True
    )
    batch = left_pad(rows, pad, model.device)
    generator: Any = model  # typed without the mixin that ``generate`` comes from
    with torch.no_grad(), without_defaults(model, (), pad):
        steps = generator.generate(
            **batch,
            generation_config=settings,
            synced_gpus=synced_gpus,
            prefix_allowed_tokens_fn=lambda number, _: [rows[number][-1]],
        ).logits  # before the processors, and in fp32 whatever the model computes in
    return torch.stack(list(steps), dim=1).to(model.dtype)


def probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a text, for a probe where no other is at hand."""
    ids: list[int] = tokenizer(PROBE_TEXT)["input_ids"]
    return ids


def _probe_row(ids: Sequence[int]) -> list[int]:
    return (list(ids) * PROBE_LENGTH)[:PROBE_LENGTH]


def _difference(expected: Tensor, values: Tensor) -> Difference:
    """The difference of two results of one shape. Where the first is not finite, nothing is compared; where only the
    second is not, the distance is infinite."""
    limit = ROUNDING[expected.dtype]
    if not bool(expected.isfinite().all()):
        return Difference(0.0, limit)
    distance = ((values.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30)).item()
    return Difference(math.inf if math.isnan(distance) else distance, limit)

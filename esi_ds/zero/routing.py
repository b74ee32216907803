"""The experts that routers choose for each token: routing frequencies, and their change by tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esi_ds.core.batch import right_pad
from esi_ds.models.roles import experts_per_token
from esi_ds.models.rows import last_logits
from esi_ds.zero import runtime
from esi_ds.zero.batching import batch_size_for
from esi_ds.zero.engine import ShardedModel

MAX_ROWS = 64  # of a set; more rows hardly change a frequency
Choices = dict[str, Tensor]  # router's name → int16 [tokens of all rows, top k], ascending in each token


def chosen_experts(output: Tensor | tuple[Tensor | None, ...], top_k: int) -> Tensor:
    """int64 [tokens, k] from a router module's output; −1 for no expert.

    transformers' routers return (logits, weights, indices). A weight of 0 chooses no expert: ZAYA's tokens may skip
    them all. Llama-4's returns (scores, logits) and a gate of remote code its logits; there the k largest logits are
    chosen. DeepSeek's own code returns (indices, weights, None).
    """
    parts = output if isinstance(output, tuple) else (output,)
    tensors = [part for part in parts if isinstance(part, Tensor)]
    indices = next((tensor for tensor in tensors if not tensor.is_floating_point()), None)
    if indices is None:
        return tensors[-1].topk(top_k, dim=-1).indices
    weights = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.shape == indices.shape]
    return indices.masked_fill(weights[-1] == 0, -1) if weights else indices


def routing_choices(model: ShardedModel, rows: Sequence[Sequence[int]], pad: int, batch_size: int) -> Choices | None:
    """The choices of every router for every token of the first MAX_ROWS rows, on rank 0; None on other ranks.

    rows: token ids. pad: the padding token. Ranks share the rows; one without rows left repeats the first one and drops
    its choices. Collectives: those of ``batch_size_for``, the gathers of ⌈rows / (batch · ranks)⌉ forward passes, and
    one gather of the choices.
    """
    rows = rows[:MAX_ROWS]
    if rows:
        batch_size, _ = batch_size_for(model, rows[0], pad, batch_size, max(map(len, rows)))
    rank, ranks = runtime.rank(), runtime.world_size()
    local_numbers = list(range(rank, len(rows), ranks))
    most = -(-len(rows) // ranks)  # rows of any rank
    local_choices: dict[int, Choices] = {}
    for start in range(0, most, batch_size):
        numbers = local_numbers[start : start + batch_size]
        choices = _choices_of([rows[number] for number in numbers] or [rows[0]], model, pad)
        local_choices |= dict(zip(numbers, choices, strict=False))
    gathered = runtime.gather_dict(local_choices)
    if not runtime.is_main():
        return None
    names = gathered[0] if gathered else {}
    return {name: torch.cat([gathered[number][name] for number in sorted(gathered)]) for name in names}


@torch.no_grad()
def _choices_of(rows: Sequence[Sequence[int]], model: ShardedModel, pad: int) -> list[Choices]:
    """The choices of each row, without padding. Collectives: the gathers of one forward pass."""
    top_k = experts_per_token(model.module.config.get_text_config())
    batch = right_pad(rows, pad, runtime.device())
    chosen: Choices = {}
    handles = []
    for name, module in model.routers.items():

        def keep(
            module: nn.Module, arguments: tuple[Any, ...], output: Tensor | tuple[Tensor | None, ...], name: str = name
        ) -> None:
            chosen[name] = chosen_experts(output, top_k).sort(dim=-1).values.to("cpu", torch.int16)

        handles.append(module.register_forward_hook(keep))
    try:
        last_logits(model.module, batch, 1)
    finally:
        for handle in handles:
            handle.remove()
        model.release()
    shape = batch["input_ids"].shape
    mask = batch["attention_mask"].bool().cpu()
    return [
        {name: experts.view(*shape, -1)[index][mask[index]] for name, experts in chosen.items()}
        for index in range(len(rows))
    ]


def frequencies(choices: Mapping[str, Tensor], num_experts: int) -> dict[str, list[int]]:
    """Router's name → number of tokens sent to each expert [num_experts]."""
    return {
        name: torch.bincount(chosen[chosen >= 0].long(), minlength=num_experts).tolist()
        for name, chosen in choices.items()
    }


def drift(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Router's name → (number of tokens whose set of experts has changed, number of tokens)."""
    return {name: (int((before[name] != after[name]).any(dim=-1).sum()), len(before[name])) for name in before}

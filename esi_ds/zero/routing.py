"""Which experts routers choose, token by token: for routing frequencies, and for how tuning changes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from esi_ds.core.batch import left_pad
from esi_ds.models.roles import experts_per_token
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel

MAX_ROWS = 64  # of each set: more rows hardly change a frequency
Choices = dict[str, Tensor]  # router's name → int16 [tokens, top k], ascending, tokens row after row


def chosen_experts(output: Tensor | tuple, top_k: int) -> Tensor:
    """int64 [tokens, k] from what a router module returns.

    transformers' routers return (logits, weights, indices). Llama-4's returns (scores, logits), a gate of remote code
    its logits: there the k largest logits are chosen.
    """
    found = output if isinstance(output, tuple) else (output,)
    for tensor in found:
        if not tensor.is_floating_point():
            return tensor
    return found[-1].topk(top_k, dim=-1).indices


def routing_choices(model: ShardedModel, rows: Sequence[Sequence[int]], pad: int, batch_size: int) -> Choices | None:
    """What every router chooses for every token of the first MAX_ROWS rows; on rank 0, None on others.

    Ranks share the rows; one that has fewer repeats one and does not count it. Collectives: the gathers of
    ⌈rows / (batch · ranks)⌉ forward passes, and one gather of the choices.
    """
    rows, rank, ranks = rows[:MAX_ROWS], runtime.rank(), runtime.world_size()
    own = list(range(rank, len(rows), ranks))
    most = -(-len(rows) // ranks)
    found: dict[int, Choices] = {}
    for start in range(0, most, batch_size):
        numbers = own[start : start + batch_size]
        made = _choices_of([rows[number] for number in numbers] or [rows[0]], model, pad)
        found |= dict(zip(numbers, made, strict=False))
    gathered = {number: row for part in runtime.gather_objects(found) for number, row in part.items()}
    if not runtime.is_main():
        return None
    names = gathered[0] if gathered else {}
    return {name: torch.cat([gathered[number][name] for number in sorted(gathered)]) for name in names}


@torch.no_grad()
def _choices_of(rows: Sequence[Sequence[int]], model: ShardedModel, pad: int) -> list[Choices]:
    """One forward pass; the choices of each row, padding left out."""
    top_k = experts_per_token(model.module.config.get_text_config())
    batch = left_pad(rows, pad, runtime.device())
    seen: Choices = {}
    handles = []
    for name, module in model.routers.items():

        def keep(module, arguments, output, name=name) -> None:
            seen[name] = chosen_experts(output, top_k).sort(dim=-1).values.to("cpu", torch.int16)

        handles.append(module.register_forward_hook(keep))
    try:
        model.module(**batch, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
        model.release()
    shape = batch["input_ids"].shape
    mask = batch["attention_mask"].bool().cpu()
    return [
        {name: chosen.view(*shape, -1)[index][mask[index]] for name, chosen in seen.items()}
        for index in range(len(rows))
    ]


def frequencies(choices: Mapping[str, Tensor], num_experts: int) -> dict[str, list[int]]:
    """How many tokens each expert got, by router: counts [num_experts]."""
    return {
        name: torch.bincount(chosen.flatten().long(), minlength=num_experts).tolist()
        for name, chosen in choices.items()
    }


def drift(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """(tokens whose set of experts is another one, tokens), by router."""
    return {name: (int((before[name] != after[name]).any(dim=-1).sum()), len(before[name])) for name in before}

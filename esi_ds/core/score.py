"""Scores of weights from gradients (METHOD §1, §2), in place on flat local tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from esi_ds.core.noise import random_bits, stream
from esi_ds.core.units import Shard, Unit

NEEDS_GRADIENT = frozenset({"esi", "grad", "snip"})


def score_shard(
    criterion: str, shard: Shard, gradient: Tensor | None, weight: Tensor, sigma: dict[Unit, float], seed: int = 0
) -> Tensor:
    """Non-negative float32 scores [shard.numel] of one shard.

    criterion: ``esi`` |σ·g|, ``grad`` |g|, ``snip`` |g·θ|, ``magnitude`` |θ|, ``random`` uniform in [0, 1).
    gradient: mean gradient, float32, overwritten with the result; None where the criterion needs none.
    weight: the shard's weights, any dtype. sigma: standard deviation of each unit of the parameter.
    """
    if criterion == "random":
        first = shard.parameter.offset + shard.low
        positions = torch.arange(first, first + shard.numel, device=weight.device)
        return random_bits(stream(seed, 0x5C03E), positions, 24).float() * 2.0**-24
    if criterion == "magnitude":
        return weight.float().abs()
    if criterion == "snip":
        gradient.mul_(weight.to(gradient))
    elif criterion == "esi":
        for unit in shard.parameter.units:
            where = unit.within(shard.low, shard.high)
            gradient[where] *= sigma[unit]
    return gradient.abs_()

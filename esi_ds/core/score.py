"""Scores of weights from gradients (docs/method.md §1, §2), in place on flat local tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from esi_ds.core.noise import random_bits, stream
from esi_ds.core.units import Shard, Unit


def score_shard(
    criterion: str,
    shard: Shard,
    gradient: Tensor | None,
    weight: Tensor,
    sigma: dict[Unit, float],
    seed: int = 0,
    tuning_gradient: Tensor | None = None,
) -> Tensor:
    """Non-negative float32 scores [shard.numel] of one shard.

    criterion: ``esi`` |σ·g_S|, ``grad`` |g_S|, ``snip`` |g_S·θ|, ``tuning_grad`` |g_T|,
    ``directed`` σ·sqrt(max(0, −g_S·g_T)), ``conflict`` σ·sqrt(max(0, g_S·g_T)), ``magnitude`` |θ|, ``random`` uniform
    in [0, 1).
    gradient, tuning_gradient: g_S and g_T, float32, one of them overwritten with the result; None where the criterion
    needs none. weight: the shard's weights, any dtype. sigma: standard deviation of each unit of the parameter.
    """
    if criterion == "random":
        positions = shard.parameter.offset + shard.flat(torch.arange(shard.numel, device=weight.device))
        return random_bits(stream(seed, 0x5C03E), positions, 24).float() * 2.0**-24
    if criterion == "magnitude":
        return weight.float().abs()
    if criterion == "tuning_grad":
        return tuning_gradient.abs_()
    if criterion == "snip":
        gradient.mul_(weight.to(gradient))
    elif criterion in ("directed", "conflict"):
        _agreement(gradient, tuning_gradient, opposite=criterion == "directed")
    if criterion in ("esi", "directed", "conflict"):
        for unit in shard.parameter.units:
            gradient[shard.within(unit)] *= sigma[unit]
    return gradient.abs_()


def _agreement(gradient: Tensor, other: Tensor, opposite: bool) -> None:
    """``gradient`` becomes sqrt(max(0, ∓ gradient · other)): 0 where the signs are not as asked (opposite or equal).

    S is climbed and a loss descended, so judge and loss agree where the signs are opposite. A square root of each
    factor: the product of two small gradients would leave float32's range.
    """
    wanted = ((gradient < 0) != (other < 0)) == opposite
    gradient.abs_().sqrt_().mul_(other.abs().sqrt_()).masked_fill_(~wanted, 0.0)


def contrast(scores: Tensor, root_fisher: Tensor, median: float) -> int:
    """``scores`` become scores / (sqrt(F) + median), docs/method.md §2; returns how many of them that leaves undefined.

    root_fisher: sqrt(F), float32, overwritten. A denominator of 0 (the median is 0, and so is this weight's F) leaves
    a score of 0 as it is; a score above 0 is undefined there, and the caller has to refuse it.
    """
    denominator = root_fisher.add_(median).to(scores.device)
    is_zero = denominator == 0
    undefined = int((is_zero & (scores > 0)).sum())
    scores.div_(denominator.masked_fill_(is_zero, 1.0))
    return undefined

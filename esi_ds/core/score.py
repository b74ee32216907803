"""Scores of weights from gradients (docs/method.md §1, §2), in place on flat local tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from esi_ds.core.noise import random_bits, stream
from esi_ds.core.units import Shard, Unit

CHUNK = 1 << 20  # random scores made at a time: their hashes are int64


def score_shard(
    criterion: str,
    shard: Shard,
    gradient: Tensor | None,
    weight: Tensor,
    sigma: Mapping[Unit, float],
    seed: int = 0,
    tuning_gradient: Tensor | None = None,
) -> Tensor:
    """Non-negative float32 scores [shard.numel] of one shard. No communication.

    criterion: ``esi`` |σ·g_S|, ``grad`` |g_S|, ``snip`` |g_S·θ|, ``tuning_grad`` |g_T|,
    ``directed`` σ·sqrt(max(0, −g_S·g_T)), ``conflict`` σ·sqrt(max(0, g_S·g_T)), ``magnitude`` |θ|, ``random`` uniform
    in [0, 1).
    gradient, tuning_gradient: g_S and g_T, float32 [shard.numel], None where the criterion does not need it; one of
    them is overwritten with the result. weight: the shard's weights [shard.numel], any dtype. sigma: standard deviation
    of each unit of the parameter.
    """
    if criterion == "random":
        return _random(shard, seed, weight.device)
    if criterion == "magnitude":
        return weight.float().abs()
    if criterion == "tuning_grad":
        assert tuning_gradient is not None
        return tuning_gradient.abs_()
    assert gradient is not None
    if criterion == "snip":
        gradient.mul_(weight.to(gradient))
    elif criterion in ("directed", "conflict"):
        assert tuning_gradient is not None
        _agreement(gradient, tuning_gradient, opposite=criterion == "directed")
    if criterion in ("esi", "directed", "conflict"):
        scale_by_unit(shard, gradient, sigma)
    return gradient.abs_()


def scale_by_unit(shard: Shard, values: Tensor, factors: Mapping[Unit, float]) -> None:
    """Multiply ``values`` [shard.numel] by the factor of the logical matrix that each lies in, in place."""
    for unit in shard.parameter.units:
        for view in shard.views(unit, values):
            view.mul_(factors[unit])


def _random(shard: Shard, seed: int, device: torch.device) -> Tensor:
    """Uniform in [0, 1), float32 [shard.numel], from the weights' positions in the model."""
    scores = torch.empty(shard.numel, dtype=torch.float32, device=device)
    key = stream(seed, 0x5C03E)
    for where, low, _ in shard.parts():
        position = shard.parameter.offset + low
        for part in scores[where].split(CHUNK):
            positions = torch.arange(position, position + len(part), device=device)
            part.copy_(random_bits(key, positions, 24)).mul_(2.0**-24)
            position += len(part)
    return scores


def _agreement(gradient: Tensor, other: Tensor, opposite: bool) -> None:
    """Overwrite ``gradient`` with sqrt(max(0, ∓ gradient · other)): − for ``opposite`` signs, else +.

    The judge's score is maximised and the loss minimised, so they agree where the signs are opposite. Each factor's
    root is taken first, because the product of two small gradients would underflow in float32.
    """
    is_kept = ((gradient < 0) != (other < 0)) == opposite
    gradient.abs_().sqrt_().mul_(other.abs().sqrt_()).masked_fill_(~is_kept, 0.0)


def contrast(scores: Tensor, denominator: Tensor) -> Tensor:
    """Overwrite ``scores`` with scores / denominator, docs/method.md §2; returns how many are undefined, int64 [].

    scores, denominator: float32 [n]; the denominator is sqrt(F) + median, and stays as it is. Where it is 0, because
    both the median and this weight's F are, a score of 0 stays 0 and a score above 0 is undefined: the caller must
    refuse it.
    """
    denominator = denominator.to(scores.device)
    is_zero = denominator == 0
    undefined = (is_zero & (scores > 0)).sum()
    scores.div_(denominator).masked_fill_(is_zero, 0.0)
    return undefined

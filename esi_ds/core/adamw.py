"""AdamW restricted to a set of coordinates (METHOD §3): the one rule by which SET and SPA change weights.

The arithmetic and its order are those of ``torch.optim.AdamW``, so that with every coordinate trained the bits agree.
Which coordinates train is told as ``None`` (all), as positions (int32 or int64 [k]: few of many) or as packed bits
(uint8 [⌈n/8⌉], least significant first: many of many). Frozen coordinates are never written through arithmetic:
0 · NaN is NaN, and −0.0 + 0.0 is +0.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 22  # coordinates handled at once where bits decide: bounds the temporaries; a multiple of 8


def adamw(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step in place on fp32 tensors of one shape (Loshchilov & Hutter 2019, algorithm 2). ``step`` is 1, 2, ..."""
    beta1, beta2 = betas
    if weight_decay != 0:
        weight.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    weight.addcdiv_(exp_avg, denominator, value=-(lr / (1 - beta1**step)))


def masked_adamw(
    weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, trained: Tensor | None, **rule
) -> None:
    """One step on the trained coordinates of a flat fp32 ``weight`` [n], in place; ``rule`` as in ``adamw``.

    gradient: fp32 [n]; may hold anything, NaN included, at frozen coordinates. Moments: [k] where ``trained`` is
    positions, else [n], and 0 at frozen coordinates.
    """
    if trained is None:
        adamw(weight, gradient, exp_avg, exp_avg_sq, **rule)
    elif trained.dtype != torch.uint8:
        picked = weight[trained]
        adamw(picked, gradient[trained], exp_avg, exp_avg_sq, **rule)
        weight[trained] = picked
    else:
        for first in range(0, len(weight), CHUNK):
            part = slice(first, min(first + CHUNK, len(weight)))
            bits = unpacked(trained[first // 8 :], part.stop - first)
            before = weight[part].clone()
            kept = torch.where(bits, gradient[part], 0.0)
            adamw(weight[part], kept, exp_avg[part], exp_avg_sq[part], **rule)
            torch.where(bits, weight[part], before, out=weight[part])


def keep_only(values: Tensor, trained: Tensor | None) -> None:
    """Zeros in a flat tensor at every frozen coordinate, in place."""
    if trained is None:
        return
    if trained.dtype != torch.uint8:
        kept = values[trained]
        values.zero_()
        values[trained] = kept
        return
    for first in range(0, len(values), CHUNK):
        part = values[first : first + CHUNK]
        part.masked_fill_(~unpacked(trained[first // 8 :], len(part)), 0.0)


def unpacked(packed: Tensor, count: int) -> Tensor:
    """bool [count] of packed bits, on their device."""
    data = packed[: -(-count // 8)]
    places = torch.arange(8, dtype=torch.uint8, device=data.device)
    return ((data[:, None] >> places) & 1).view(-1)[:count].bool()


def clip_factor(norm: float, clip: float | None) -> float | None:
    """What gradients of this norm are multiplied by; None: left alone (as torch's clip_grad_norm_)."""
    if clip is None or norm + 1e-6 <= clip:
        return None
    return clip / (norm + 1e-6)

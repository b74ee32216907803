"""AdamW restricted to a set of coordinates (docs/method.md §3): the one rule by which SET and SPA change weights.

The arithmetic and its order are those of ``torch.optim.AdamW``, so that with every coordinate trained the bits agree.
Which coordinates train is told as ``None`` (all), as positions (int32 or int64 [k]: few of many) or as packed bits
(uint8 [⌈n/8⌉], least significant first: many of many). Frozen coordinates are never written through arithmetic:
0 · NaN is NaN, and −0.0 + 0.0 is +0.0. Where bits decide, they select with AND and XOR on the numbers' own bits:
``torch.where`` on a CPU branches at every coordinate and takes most of the step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Coordinates handled at once where bits decide, a multiple of 8: bounds the temporaries, in cache on a CPU.
CHUNK, CPU_CHUNK = 1 << 22, 1 << 18
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number


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
        for part in chunks(weight):
            before = as_integers(weight[part]).clone()
            selected = selection(trained, part, before.dtype)
            kept = (as_integers(gradient[part]) & selected).view(weight.dtype)
            exp_avg_sq[part] += ~selected & 1  # a CPU's square root of 0 takes ten times that of 1
            adamw(weight[part], kept, exp_avg[part], exp_avg_sq[part], **rule)
            as_integers(exp_avg_sq[part]).bitwise_and_(selected)
            after = as_integers(weight[part])
            after.bitwise_xor_(before).bitwise_and_(selected).bitwise_xor_(before)  # after where selected, else before


def keep_only(values: Tensor, trained: Tensor | None) -> None:
    """Zeros in a flat tensor at every frozen coordinate, in place."""
    if trained is None:
        return
    if trained.dtype != torch.uint8:
        kept = values[trained]
        values.zero_()
        values[trained] = kept
        return
    for part in chunks(values):
        own = as_integers(values[part])
        own.bitwise_and_(selection(trained, part, own.dtype))


def chunks(flat: Tensor) -> Iterator[slice]:
    size = CPU_CHUNK if flat.device.type == "cpu" else CHUNK
    for first in range(0, len(flat), size):
        yield slice(first, min(first + size, len(flat)))


def as_integers(values: Tensor) -> Tensor:
    """The same memory as integers of the same width."""
    return values.view(INTEGERS[values.element_size()])


def selection(packed: Tensor, part: slice, dtype: torch.dtype) -> Tensor:
    """Integers of some coordinates, from a multiple of 8: all ones where their bit is set, else 0; on its device."""
    data = packed[part.start // 8 : -(-part.stop // 8)]
    places = torch.arange(8, dtype=torch.uint8, device=data.device)
    bits = ((data[:, None] >> places) & 1).view(-1)[: part.stop - part.start]
    return bits.view(torch.int8).neg_().to(dtype)  # −1 is all ones


def clip_factor(norm: float, clip: float | None) -> float | None:
    """What gradients of this norm are multiplied by; None: left alone (as torch's clip_grad_norm_)."""
    if clip is None or norm + 1e-6 <= clip:
        return None
    return clip / (norm + 1e-6)

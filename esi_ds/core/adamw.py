"""AdamW restricted to a set of coordinates (docs/method.md §3): the only update rule of SET and SPA.

The operations and their order are those of ``torch.optim.AdamW``, so the bits agree where every coordinate is trained.
The trained coordinates are ``None`` (all of them), positions (int32 or int64 [k], for a small share) or packed bits
(uint8 [⌈n/8⌉], least significant first, for a large share). Frozen coordinates never take part in arithmetic:
0 · NaN is NaN, and −0.0 + 0.0 is +0.0. Packed bits select by AND and XOR on the bits of the floating-point numbers,
because ``torch.where`` on a CPU branches at every coordinate and would take most of the step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Coordinates processed together under packed bits, a multiple of 8: bounds the temporaries; fits a CPU's cache.
CHUNK, CPU_CHUNK = 1 << 22, 1 << 18
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per number


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
    """One step in place on fp32 tensors of one shape (Loshchilov & Hutter 2019, algorithm 2); ``step`` starts at 1."""
    beta1, beta2 = betas
    if weight_decay != 0:
        weight.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    weight.addcdiv_(exp_avg, denominator, value=-(lr / (1 - beta1**step)))


def masked_adamw(
    weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, trained: Tensor | None, **rule: Any
) -> None:
    """One step, in place, on the trained coordinates of a flat fp32 ``weight`` [n]; ``rule`` as in ``adamw``.

    gradient: fp32 [n]; frozen coordinates may hold anything, including NaN. exp_avg, exp_avg_sq: fp32, [k] where
    ``trained`` is positions, else [n] with 0 at frozen coordinates.
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
            exp_avg_sq[part] += ~selected & 1  # on a CPU the square root of 0 takes ten times as long as that of 1
            adamw(weight[part], kept, exp_avg[part], exp_avg_sq[part], **rule)
            as_integers(exp_avg_sq[part]).bitwise_and_(selected)
            _keep_frozen(as_integers(weight[part]), before, selected)


def keep_only(values: Tensor, trained: Tensor | None) -> None:
    """Set every frozen coordinate of a flat tensor to 0, in place."""
    if trained is None:
        return
    if trained.dtype != torch.uint8:
        kept = values[trained]
        values.zero_()
        values[trained] = kept
        return
    for part in chunks(values):
        bits = as_integers(values[part])
        bits.bitwise_and_(selection(trained, part, bits.dtype))


def restore_frozen(weight: Tensor, before: Tensor, trained: Tensor | None) -> None:
    """Write every frozen coordinate of ``before`` into ``weight``, in place; both flat, of one size and dtype."""
    if trained is None:
        return
    if trained.dtype != torch.uint8:
        picked = weight[trained]
        weight.copy_(before)
        weight[trained] = picked
        return
    for part in chunks(weight):
        after = as_integers(weight[part])
        _keep_frozen(after, as_integers(before[part]), selection(trained, part, after.dtype))


def _keep_frozen(after: Tensor, before: Tensor, selected: Tensor) -> None:
    """Integers of one width, in place: ``after`` where ``selected`` has all bits set, else ``before``."""
    after.bitwise_xor_(before).bitwise_and_(selected).bitwise_xor_(before)


def frozen_digest(values: Tensor, trained: Tensor | None) -> str:
    """sha256 of the bits of a flat tensor's frozen coordinates, the trained ones as 0."""
    bits = as_integers(values.detach().clone())
    if trained is None:
        bits.zero_()
    elif trained.dtype != torch.uint8:
        bits[trained] = 0
    else:
        for part in chunks(bits):
            bits[part].bitwise_and_(~selection(trained, part, bits.dtype))
    return hashlib.sha256(bits.cpu().numpy().data).hexdigest()


def chunks(flat: Tensor) -> Iterator[slice]:
    """Consecutive ranges of a flat tensor, each beginning at a multiple of 8."""
    size = CPU_CHUNK if flat.device.type == "cpu" else CHUNK
    for first in range(0, len(flat), size):
        yield slice(first, min(first + size, len(flat)))


def as_integers(values: Tensor) -> Tensor:
    """A view of the same memory as integers of the same width: −0.0 and 0.0 differ, NaN equals itself."""
    return values.view(INTEGERS[values.element_size()])


def selection(packed: Tensor, part: slice, dtype: torch.dtype) -> Tensor:
    """``dtype`` [part]: −1 (all bits one) where the coordinate's packed bit is set, else 0. ``part`` starts at a
    multiple of 8."""
    data = packed[part.start // 8 : -(-part.stop // 8)]
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device)
    bits = ((data[:, None] >> shifts) & 1).view(-1)[: part.stop - part.start]
    return bits.view(torch.int8).neg_().to(dtype)


def clip_factor(norm: float, clip: float | None) -> float | None:
    """The factor that clips gradients of this norm, as in torch's ``clip_grad_norm_``; None where none is needed."""
    if clip is None or norm + 1e-6 <= clip:
        return None
    return clip / (norm + 1e-6)

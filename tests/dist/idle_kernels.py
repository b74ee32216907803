"""Grouped products as the kernel of some GPUs computes them: garbage in the gradients of experts without tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

GARBAGE = (3e4, torch.nan)  # a number that would be the largest of any gradient; what multiplying by 0 does not remove


class _Garbage(torch.autograd.Function):
    """The weight as it is; in the backward pass, garbage in the rows of empty groups."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, offsets: Tensor) -> Tensor:
        ctx.offsets = offsets
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        idle = ctx.offsets.diff(prepend=ctx.offsets.new_zeros(1)) == 0
        spoilt = gradient.clone()
        spoilt[idle] = GARBAGE[0]
        spoilt[idle, :, ::2] = GARBAGE[1]
        return spoilt, None


def leaves_garbage(grouped_product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch._grouped_mm``, which ``torch.nn.functional.grouped_mm`` calls too, with garbage where no token was."""

    def spoilt(input: Tensor, weight: Tensor, *, offs: Tensor, **options: Any) -> Tensor:
        return grouped_product(input, _Garbage.apply(weight, offs), offs=offs, **options)

    return spoilt


def spoil_kernels() -> None:
    """For the rest of the process."""
    torch._grouped_mm = leaves_garbage(torch._grouped_mm)

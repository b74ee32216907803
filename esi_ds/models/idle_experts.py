"""Experts that no token of a batch reaches get a gradient of exactly zero, whatever a kernel leaves in their rows.

A grouped matrix product multiplies the tokens of all experts of a layer in one call. Where a group is empty, the
kernel of some GPUs leaves garbage in the rows of that expert's weight gradient (B200, pytorch#172439). It arises on
each rank alone, before gradients are summed over ranks, and in each call alone; so it is removed there, in the backward
pass of the call that knows its groups.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.integrations import moe


class _ZeroIdle(torch.autograd.Function):
    """The weight as it is; in the backward pass, rows of empty groups become 0."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.counts = counts
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # In place: the kernel has just created this gradient for its one call, and a copy would double the largest
        # gradients of a model. Filled, not multiplied, because garbage may be NaN.
        return gradient.masked_fill_((ctx.counts == 0).view(-1, 1, 1), 0), None


def zero_idle_gradient(weight: Tensor, counts: Tensor) -> Tensor:
    """The same weight, whose gradient will be exactly 0 for experts without tokens.

    weight: [E, n, m], of one grouped product. counts: integer [E], tokens of each expert.
    """
    return _ZeroIdle.apply(weight, counts) if weight.requires_grad else weight


def mend_grouped_product() -> None:
    """Let every grouped product of transformers zero the gradients of experts without tokens; again: no effect.

    Its other implementations need no help: loops and gathers of single experts start from zeros.
    """
    grouped_product = moe._grouped_mm
    if getattr(grouped_product, "zeroes_idle", False):
        return

    @wraps(grouped_product)
    def mended(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        counts = offs.diff(prepend=offs.new_zeros(1))  # offs [E]: the end of each expert's tokens
        return grouped_product(input, zero_idle_gradient(weight, counts), offs)

    mended.zeroes_idle = True  # type: ignore[attr-defined]  # a mark on the function
    moe._grouped_mm = mended

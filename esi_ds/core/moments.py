"""Standard deviation of a matrix from moments of its parts, in float64 (docs/method.md §1; Chan et al. 1983).

The last dimension of a moments tensor is (n, mean, M2), with M2 the sum of squared deviations from the mean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 1 << 22  # elements converted to float64 at a time: 32 MiB


def moments(values: Tensor) -> Tensor:
    """(n, mean, M2), float64 [3] on the device of ``values``, a 1-D tensor of any dtype; zeros where it is empty.

    A GPU is not waited for.
    """
    total = torch.zeros(3, dtype=torch.float64, device=values.device)
    for chunk in values.split(CHUNK) if values.numel() else ():
        variance, mean = torch.var_mean(chunk.double(), correction=0)
        part = torch.stack([torch.full_like(mean, chunk.numel()), mean, variance * chunk.numel()])
        total = merge(torch.stack([total, part]).unsqueeze(1), lambda local: local.sum(0))[0]
    return total


def merge(local: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Moments of the union of all parts, by Chan's formula: float64 [..., 3].

    mean = Σ n·mean_part / Σ n and M2 = Σ (M2_part + n·(mean_part − mean)²). local: float64 [..., 3], the caller's
    parts. reduce: adds up over all parts (over ranks an all-reduce, in one process a sum); called twice.
    """
    count, mean, deviations = local.unbind(-1)
    total, weighted = reduce(torch.stack([count, count * mean], dim=-1)).unbind(-1)
    global_mean = torch.where(total > 0, weighted / total.clamp(min=1), 0.0)
    global_deviations = reduce(deviations + count * (mean - global_mean).square())
    return torch.stack([total, global_mean, global_deviations], dim=-1)


def standard_deviation(merged: Tensor) -> Tensor:
    """Unbiased (n − 1) standard deviation, float64 [...], of moments [..., 3]; 0 for fewer than two elements."""
    count, _, deviations = merged.unbind(-1)
    return torch.where(count > 1, deviations / (count - 1).clamp(min=1), 0.0).sqrt()

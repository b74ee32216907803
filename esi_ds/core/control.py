"""Scores of what is safety's own, set against a control (docs/method.md §2), in place on flat local tensors.

s is a score of safety, c = |σ·g_C| the control's score of the same weight. Both are taken in multiples of their means
over all scored weights, so that judges, losses and numbers of prompts of other scales can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from esi_ds.core.units import Shard, Unit


@dataclass(frozen=True)
class MeanScores:
    """Means over all ranks. safety, control: of s and of c over all scored weights, control above 0. control_by_unit:
    of c over each logical matrix."""

    safety: float
    control: float
    control_by_unit: Mapping[Unit, float]


def specific(shard: Shard, scores: Tensor, control: Tensor, means: MeanScores) -> None:
    """Overwrite s with (s / mean s) / (max(c, m) / mean c), m the mean of c over the weight's logical matrix.

    scores: s, float32 [shard.numel]. control: float32 [shard.numel] of either sign, whose absolute value is c. Without
    the floor m, noise in a c close to 0 would decide the ranking. Where the control reaches no weight of a matrix, as
    with an expert that none of its tokens chose, m is the mean over all scored weights.
    """
    if means.safety == 0:  # every score is 0, and stays so
        return
    scores.div_(means.safety)
    for unit in shard.parameter.units:
        floor = (means.control_by_unit[unit] or means.control) / means.control
        for view, other in zip(shard.views(unit, scores), shard.views(unit, control), strict=True):
            view.div_(other.abs().div_(means.control).clamp_(min=floor))


def excess(scores: Tensor, control: Tensor, means: MeanScores) -> None:
    """Overwrite s with max(0, s / mean s − c / mean c); arguments as those of ``specific``.

    What has no more of safety than of the control is all alike: scores are at least 0, as every score is.
    """
    if means.safety > 0:
        scores.div_(means.safety)
    scores.sub_(control.abs().div_(means.control)).clamp_(min=0)


def exclusive(scores: Tensor, control: Tensor, tuning_gradient: Tensor) -> None:
    """Overwrite the scores of ``directed`` with 0 where the step that they agree on improves the control as well.

    scores: float32 [n]. control: float32 [n], with the sign of the direction in which the control improves.
    tuning_gradient: g_T, float32 [n], against whose sign the step goes.
    """
    scores.masked_fill_(((control < 0) != (tuning_gradient < 0)) & (control != 0), 0.0)

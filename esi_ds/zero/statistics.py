"""Statistics of the scores for the report, counted on the shards: per logical matrix, and as histograms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from esi_ds.core.select import CHUNK
from esi_ds.core.units import Parameter, Unit
from esi_ds.report.contents import ScoreHistogram, UnitRow
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.score import Scores, Selection, unit_shards, with_rows

NUM_BINS = 60


def unit_rows(model: ShardedModel, scores: Scores, selection: Selection, sigma: dict[Unit, float]) -> list[UnitRow]:
    """One row a logical matrix, in the model's order. Collectives: two all-reduces of float64 [units, ≤ 2]."""
    scored = [(parameter, unit) for parameter in model.parameters for unit in parameter.units]
    local: dict[int, Tensor] = {}  # row → selected, sum, maximum
    for row, unit, shard in unit_shards(model):
        values = shard.elements(unit, scores[shard.name])
        if len(values):
            selected = shard.elements(unit, selection.bits[shard.name]).sum()
            local[row] = torch.stack([selected.double(), values.sum(dtype=torch.float64), values.max().double()])
    numbers = with_rows(torch.zeros(len(scored), 3, dtype=torch.float64), local)
    sums = runtime.all_reduce_sum(numbers[:, :2].contiguous())
    largest = runtime.all_reduce_max(numbers[:, 2].contiguous())
    return [
        {
            "name": unit.name,
            "parameter": parameter.name,
            "role": unit.role,
            "layer": unit.layer,
            "expert": unit.expert,
            "numel": unit.numel,
            "selected": int(sums[row, 0]),
            "mean_score": float(sums[row, 1]) / unit.numel,
            "max_score": float(largest[row]),
            "sigma": sigma.get(unit),
        }
        for row, (parameter, unit) in enumerate(scored)
    ]


def log_histograms(model: ShardedModel, scores: Scores) -> tuple[ScoreHistogram, dict[str, list[int]]]:
    """Histograms of log10(score): of all scored weights, and by role. Zeros are counted separately.

    Collectives: an all-reduce for the range, one of int64 [roles, bins + 1].
    """
    low, high = _range(scores)
    edges = torch.linspace(low, high, NUM_BINS + 1, dtype=torch.float64)
    roles = sorted({unit.role for parameter in model.parameters for unit in parameter.units})
    local: dict[int, Tensor] = {}  # role's row → counts
    for _, unit, shard in unit_shards(model):
        row, part = roles.index(unit.role), _counts(shard.elements(unit, scores[shard.name]), low, high)
        local[row] = local[row] + part if row in local else part
    counts = runtime.all_reduce_sum(with_rows(torch.zeros(len(roles), NUM_BINS + 1, dtype=torch.int64), local))
    total = counts.sum(0).tolist()
    overall: ScoreHistogram = {"log10_edges": edges.tolist(), "counts": total[:NUM_BINS], "zeros": total[NUM_BINS]}
    return overall, {role: row[:NUM_BINS].tolist() for role, row in zip(roles, counts, strict=True)}


def _range(scores: Scores) -> tuple[float, float]:
    """log10 of the smallest positive and of the largest score over all ranks, widened if equal. One all-reduce."""
    ends = torch.tensor([-math.inf, -math.inf], dtype=torch.float64)  # maxima of −log10 and of log10
    parts = [values for values in scores.values() if len(values)]
    if parts:  # all are read at once, so that a GPU is waited for once
        smallest = torch.stack([torch.where(values > 0, values, math.inf).min() for values in parts]).min()
        largest = torch.stack([values.max() for values in parts]).max()
        lowest, highest = torch.stack([smallest, largest]).double().cpu()
        if highest > 0:
            ends[0], ends[1] = -lowest.log10(), highest.log10()
    runtime.all_reduce_max(ends)
    if not ends.isfinite().all():
        return -1.0, 1.0  # no positive score at all
    low, high = -float(ends[0]), float(ends[1])
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _counts(values: Tensor, low: float, high: float) -> Tensor:
    """int64 [NUM_BINS + 1]: the counts of the bins, then that of zeros."""
    counts = torch.zeros(NUM_BINS + 1, dtype=torch.int64, device=values.device)
    for chunk in values.split(CHUNK):  # a GPU may have no room for a large matrix in float64
        logarithms = torch.where(chunk > 0, chunk, 1.0).double().log10()
        bins = ((logarithms - low) / (high - low) * NUM_BINS).long().clamp_(0, NUM_BINS - 1)
        counts += torch.bincount(bins.masked_fill_(chunk <= 0, NUM_BINS), minlength=NUM_BINS + 1)
    return counts


def unscored_numel(parameters: tuple[Parameter, ...]) -> dict[str, int]:
    """Number of weights that are not scored, by role."""
    numels: dict[str, int] = {}
    for parameter in parameters:
        if not parameter.scored:
            numels[parameter.role] = numels.get(parameter.role, 0) + parameter.numel
    return numels

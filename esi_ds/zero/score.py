"""Scores and selections on partitions (METHOD §1, §2): ranks work on their shards, only moments and counts travel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from esi_ds.core.moments import merge, moments, standard_deviation
from esi_ds.core.score import contrast, score_shard
from esi_ds.core.select import Cut, Order, Piece, median, model_k, select
from esi_ds.core.units import Parameter, Shard, Unit
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel

Scores = dict[str, Tensor]  # parameter name → this rank's flat float32 scores


def local_part(values: Tensor, unit: Unit, shard: Shard) -> Tensor:
    """The elements of a shard-sized flat tensor that belong to one unit."""
    return values[unit.within(shard.low, shard.high)]


def unit_sigmas(model: ShardedModel) -> dict[Unit, float]:
    """σ of every logical matrix. Collectives: two all-reduces of float64 [units, 3]."""
    scored = [(parameter, unit) for parameter in model.parameters for unit in parameter.units]
    local = [
        moments(local_part(model.local_weight(parameter), unit, model.shard(parameter))) for parameter, unit in scored
    ]
    merged = merge(torch.stack(local), runtime.all_reduce_sum)
    return dict(zip((unit for _, unit in scored), standard_deviation(merged).tolist(), strict=True))


@dataclass(frozen=True)
class Accumulated:
    """What an objective's pass leaves behind: sums on this rank's shards, and the number that makes a mean of them."""

    sums: Mapping[str, Tensor]
    count: int

    def mean(self, name: str) -> Tensor:
        """The sums of one parameter, overwritten with the mean: ask once."""
        return self.sums[name].div_(self.count)


def score(
    model: ShardedModel, criterion: str, accumulated: Mapping[str, Accumulated], sigma: Mapping[Unit, float], seed: int
) -> Scores:
    """Every shard's scores from the means of ``safety`` and ``tuning``, as far as the criterion has them, which are
    overwritten. No collectives."""
    scores = {}
    for parameter in model.parameters:
        if parameter.scored:
            safety, tuning = (
                accumulated[name].mean(parameter.name) if name in accumulated else None for name in ("safety", "tuning")
            )
            weight = model.local_weight(parameter)
            scores[parameter.name] = score_shard(
                criterion, model.shard(parameter), safety, weight, sigma, seed, tuning_gradient=tuning
            )
    return scores


def contrast_scores(model: ShardedModel, scores: Scores, benign: Accumulated) -> int:
    """``scores`` become score / (sqrt(F) + median of sqrt(F)), METHOD §2; how many have no such quotient.

    The median is exact, over all scored weights of all ranks. Collectives: three all-reduced histograms of 16 KiB, and
    one all-reduce of a number.
    """
    roots = {name: benign.mean(name).sqrt_() for name in scores}
    num_scored = sum(parameter.numel for parameter in model.parameters if parameter.scored)
    middle = median(list(roots.values()), num_scored, runtime.all_reduce_sum)
    undefined = sum(contrast(values, roots[name], middle) for name, values in scores.items())
    return int(runtime.all_reduce_sum(torch.tensor(undefined)))


def unit_offsets(parameter: Parameter) -> Iterator[tuple[Unit, int]]:
    """Units of a parameter, each with a global position of its first element when units lie one behind another."""
    offset = parameter.offset
    for unit in parameter.units:
        yield unit, offset
        offset += unit.numel


def unit_position(unit: Unit, offset: int, shard: Shard) -> int:
    """Position of the first element of ``unit`` in ``shard``, counting only the unit's elements from ``offset``."""
    before = max(0, shard.low - unit.start)
    if unit.count == 1:
        return offset + min(before, unit.length)
    runs, rest = divmod(before, unit.stride)
    return offset + min(runs * unit.length + min(rest, unit.length), unit.numel)


@dataclass(frozen=True)
class Selection:
    """Which of this rank's weights are selected, and what the whole mask looks like.

    bits: name → bool [shard.numel]. counts: name → selected weights over all ranks. cut: where the whole model's
    scores are cut (scope ``model``), else None.
    """

    bits: dict[str, Tensor]
    counts: dict[str, int]
    k: int
    cut: Cut | None


def select_weights(
    model: ShardedModel, scores: Scores, *, ratio: float, order: str, of: str, scope: str, seed: int
) -> Selection:
    """The exact mask (METHOD §2). Collectives: histograms of 16 KiB (scope model) and one count per parameter."""
    ordering = Order(order, seed)
    scored = [parameter for parameter in model.parameters if parameter.scored]
    last = sum(parameter.numel for parameter in model.parameters) - 1
    bits: dict[str, Tensor] = {}
    cut = None
    if scope == "model":
        pieces = [Piece(scores[p.name], p.offset + model.shard(p).low) for p in scored]
        k = model_k(model.parameters, ratio, of)
        (cut,) = select([pieces], [k], ordering, last, runtime.all_reduce_sum)
        for piece, parameter in zip(pieces, scored, strict=True):
            bits[parameter.name] = selected_bits(cut, ordering, piece)
    else:
        for parameter in scored:
            bits[parameter.name] = _select_by_unit(model, parameter, scores[parameter.name], ratio, ordering, last)
    local = torch.tensor([int(bits[parameter.name].sum()) for parameter in scored])
    counts = runtime.all_reduce_sum(local).tolist()
    return Selection(bits, dict(zip((p.name for p in scored), counts, strict=True)), sum(counts), cut)


def selected_bits(cut: Cut, order: Order, piece: Piece) -> Tensor:
    """Bool, one for each score of the piece."""
    return cut.selects(order.keys(piece.scores, piece.position), piece.position)


def _select_by_unit(
    model: ShardedModel, parameter: Parameter, scores: Tensor, ratio: float, order: Order, last: int
) -> Tensor:
    """Scope ``matrix``: ⌊ratio · n⌋ of each logical matrix of one parameter, all of them in the same histograms."""
    shard = model.shard(parameter)
    bits = torch.zeros(shard.numel, dtype=torch.bool, device=scores.device)
    pieces = [
        Piece(local_part(scores, unit, shard), unit_position(unit, offset, shard))
        for unit, offset in unit_offsets(parameter)
    ]
    wanted = [int(ratio * unit.numel) for unit in parameter.units]
    cuts = select([[piece] for piece in pieces], wanted, order, last, runtime.all_reduce_sum)
    for unit, piece, cut in zip(parameter.units, pieces, cuts, strict=True):
        bits[unit.within(shard.low, shard.high)] = selected_bits(cut, order, piece)
    return bits

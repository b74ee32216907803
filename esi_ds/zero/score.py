"""Scores and selections on partitions (docs/method.md §1, §2): only moments and counts leave a rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from esi_ds.core.moments import merge, moments, standard_deviation
from esi_ds.core.score import contrast, score_shard
from esi_ds.core.select import Cut, Order, Piece, median, model_k, select
from esi_ds.core.units import Parameter, Shard, Unit
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel

Scores = dict[str, Tensor]  # shard's name → this rank's flat float32 scores


def local_part(values: Tensor, unit: Unit, shard: Shard) -> Tensor:
    """The elements of a shard-sized flat tensor that belong to one unit."""
    return values[shard.within(unit)]


def unit_sigmas(model: ShardedModel) -> dict[Unit, float]:
    """σ of every logical matrix. Collectives: two all-reduces of float64 [units, 3]."""
    units = [unit for parameter in model.parameters for unit in parameter.units]
    local = torch.stack([moments(torch.zeros(0))] * len(units))
    for row, unit, shard in unit_shards(model):
        local[row] = moments(local_part(model.local_weight(shard), unit, shard))
    merged = merge(local, runtime.all_reduce_sum)
    return dict(zip(units, standard_deviation(merged).tolist(), strict=True))


def unit_shards(model: ShardedModel) -> Iterator[tuple[int, Unit, Shard]]:
    """(number of the unit in the model's order, unit, shard) of every unit that this rank holds a part of.

    A rank holds a unit in one tensor only: AutoEP parts a parameter between its matrices.
    """
    sizes = [len(parameter.units) for parameter in model.parameters]
    first = dict(zip((p.name for p in model.parameters), accumulate(sizes, initial=0), strict=False))
    for shard in model.scored:
        for index, unit in enumerate(shard.parameter.units):
            if any(unit.meets(low, high) for low, high in shard.runs):
                yield first[shard.parameter.name] + index, unit, shard


@dataclass(frozen=True)
class Accumulated:
    """What an objective's pass leaves behind: sums on this rank's shards, and the number that makes a mean of them."""

    sums: Mapping[str, Tensor]
    count: int

    def mean(self, name: str) -> Tensor:
        """The sums of one shard, overwritten with the mean: ask once."""
        return self.sums[name].div_(self.count)


def score(
    model: ShardedModel, criterion: str, accumulated: Mapping[str, Accumulated], sigma: Mapping[Unit, float], seed: int
) -> Scores:
    """Every shard's scores from the means of ``safety`` and ``tuning``, as far as the criterion has them, which are
    overwritten. No collectives."""
    scores = {}
    for shard in model.scored:
        safety, tuning = (
            accumulated[name].mean(shard.name) if name in accumulated else None for name in ("safety", "tuning")
        )
        weight = model.local_weight(shard)
        scores[shard.name] = score_shard(criterion, shard, safety, weight, sigma, seed, tuning_gradient=tuning)
    return scores


def contrast_scores(model: ShardedModel, scores: Scores, benign: Accumulated) -> int:
    """``scores`` become score / (sqrt(F) + median of sqrt(F)), docs/method.md §2; how many have no such quotient.

    The median is exact, over all scored weights of all ranks. Collectives: three all-reduced histograms of 16 KiB, and
    one all-reduce of a number.
    """
    roots = {name: benign.mean(name).sqrt_() for name in scores}
    num_scored = sum(parameter.numel for parameter in model.parameters if parameter.scored)
    middle = median(list(roots.values()), num_scored, runtime.all_reduce_sum)
    undefined = sum(contrast(values, roots[name], middle) for name, values in scores.items())
    return int(runtime.all_reduce_sum(torch.tensor(undefined)))


def silent_experts(rows: Iterable[Mapping[str, Any]]) -> str | None:
    """What to tell a user whose routed experts got no gradient; None where every layer of them has one.

    rows: ``unit_rows`` of the scores. Some experts are never chosen; that a whole layer's have a score of exactly 0
    means that no gradient reaches them: remote code runs experts under ``torch.no_grad`` unless the model trains.
    """
    largest: dict[int | None, float] = {}
    for row in rows:
        if row["expert"] is not None:
            largest[row["layer"]] = max(largest.get(row["layer"], 0.0), row["max_score"], abs(row["mean_score"]))
    silent = [str(layer) for layer, score in largest.items() if score == 0]
    if not silent:
        return None
    return (
        f"WARNING: every routed expert of {len(silent)} of {len(largest)} layers has a score of exactly 0 (layers "
        f"{', '.join(silent)}): no gradient reaches them, and their scores say nothing. Does the model's own code run "
        "its experts without gradients where it does not train?"
    )


@dataclass(frozen=True)
class Selection:
    """Which of this rank's weights are selected, and what the whole mask looks like.

    bits: shard's name → bool [shard.numel]. counts: parameter's name → selected weights over all ranks. cut: where the
    whole model's scores are cut (scope ``model``), else None.
    """

    bits: dict[str, Tensor]
    counts: dict[str, int]
    k: int
    cut: Cut | None


def select_weights(
    model: ShardedModel, scores: Scores, *, ratio: float, order: str, of: str, scope: str, seed: int
) -> Selection:
    """The exact mask (docs/method.md §2). Collectives: 16 KiB histograms (scope model), one count per parameter."""
    ordering = Order(order, seed)
    scored = [parameter for parameter in model.parameters if parameter.scored]
    last = sum(parameter.numel for parameter in model.parameters) - 1
    bits: dict[str, Tensor] = {}
    cut = None
    if scope == "model":
        pieces = {shard.name: list(pieces_of(shard, scores[shard.name])) for shard in model.scored}
        k = model_k(model.parameters, ratio, of)
        (cut,) = select(
            [[piece for own in pieces.values() for piece in own]], [k], ordering, last, runtime.all_reduce_sum
        )
        for shard in model.scored:
            found = [selected_bits(cut, ordering, piece) for piece in pieces[shard.name]]
            bits[shard.name] = torch.cat([torch.zeros(0, dtype=torch.bool, device=scores[shard.name].device), *found])
    else:
        for parameter in scored:
            bits |= _select_by_unit(model, parameter, scores, ratio, ordering, last)
    local = torch.zeros(len(scored), dtype=torch.int64)
    rows = {parameter.name: row for row, parameter in enumerate(scored)}
    for shard in model.scored:
        local[rows[shard.parameter.name]] += int(bits[shard.name].sum())
    counts = runtime.all_reduce_sum(local).tolist()
    return Selection(bits, dict(zip(rows, counts, strict=True)), sum(counts), cut)


def pieces_of(shard: Shard, scores: Tensor) -> Iterator[Piece]:
    """Runs of a shard's scores, each with its global position."""
    for where, low, _ in shard.parts():
        yield Piece(scores[where], shard.parameter.offset + low)


def selected_bits(cut: Cut, order: Order, piece: Piece) -> Tensor:
    """Bool, one for each score of the piece."""
    return cut.selects(order.keys(piece.scores, piece.position), piece.position)


def _select_by_unit(
    model: ShardedModel, parameter: Parameter, scores: Scores, ratio: float, order: Order, last: int
) -> dict[str, Tensor]:
    """Scope ``matrix``: ⌊ratio · n⌋ of each logical matrix of one parameter, all of them in the same histograms.

    Returns the bits of this rank's shards of the parameter, by the shard's name.
    """
    shards = model.shards_of(parameter)
    bits = {
        shard.name: torch.zeros(shard.numel, dtype=torch.bool, device=scores[shard.name].device) for shard in shards
    }
    groups = []  # of every unit: (shard's name, where in the shard, piece)
    for unit, offset in parameter.unit_offsets():
        group = []
        for shard in shards:
            for where, low, high in shard.parts():
                if unit.meets(low, high):
                    positions = unit.within(low, high)
                    run = scores[shard.name][where]
                    group.append((shard.name, where, positions, Piece(run[positions], offset + unit.num_before(low))))
        groups.append(group)
    wanted = [int(ratio * unit.numel) for unit in parameter.units]
    pieces = [[entry[-1] for entry in group] for group in groups]
    for group, cut in zip(groups, select(pieces, wanted, order, last, runtime.all_reduce_sum), strict=True):
        for name, where, positions, piece in group:
            bits[name][where][positions] = selected_bits(cut, order, piece)
    return bits

"""Scores and selections on ZeRO-3 partitions (docs/method.md §1, §2): only moments and counts leave a rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from esi_ds.core.criteria import GRADIENTS
from esi_ds.core.moments import merge, moments, standard_deviation
from esi_ds.core.score import contrast, scale_by_unit, score_shard
from esi_ds.core.select import Cut, Order, ScoreRun, all_valid, chunks, first_invalid, median, model_k, select
from esi_ds.core.units import Parameter, Shard, Unit, assign
from esi_ds.errors import UserError
from esi_ds.report.contents import UnitRow
from esi_ds.zero import runtime
from esi_ds.zero.engine import ShardedModel

Scores = dict[str, Tensor]  # shard's name → this rank's flat float32 scores


def unit_sigmas(model: ShardedModel) -> dict[Unit, float]:
    """σ of every logical matrix. Collectives: two all-reduces, of float64 [units, 2] and [units]."""
    units = [unit for parameter in model.parameters for unit in parameter.units]
    parts = {row: moments(shard.elements(unit, model.local_weight(shard))) for row, unit, shard in unit_shards(model)}
    merged = merge(with_rows(torch.zeros(len(units), 3, dtype=torch.float64), parts), runtime.all_reduce_sum)
    return dict(zip(units, standard_deviation(merged).tolist(), strict=True))


def with_rows(table: Tensor, parts: Mapping[int, Tensor]) -> Tensor:
    """The table, which lies on the CPU, with these rows set, which may lie on a GPU. All rows are copied in one
    transfer, so the GPU is waited for only once."""
    if parts:
        table[list(parts)] = torch.stack(list(parts.values())).cpu()
    return table


def unit_shards(model: ShardedModel) -> Iterator[tuple[int, Unit, Shard]]:
    """(number of the unit in the model's order, unit, shard) of every unit of which this rank holds a part.

    A rank holds a unit in one tensor only, because AutoEP splits a parameter between its matrices.
    """
    sizes = [len(parameter.units) for parameter in model.parameters]
    first = dict(zip((p.name for p in model.parameters), accumulate(sizes, initial=0), strict=False))
    for shard in model.scored:
        for index, unit in enumerate(shard.parameter.units):
            if any(unit.meets(low, high) for low, high in shard.runs):
                yield first[shard.parameter.name] + index, unit, shard


@dataclass(frozen=True)
class Accumulated:
    """The sums of an objective's pass, fp32 [shard.numel] by shard's name, and the count to divide them by."""

    sums: Mapping[str, Tensor]
    count: int

    def take_means(self) -> dict[str, Tensor]:
        """The means, which overwrite the sums: call once."""
        return {name: sums.div_(self.count) for name, sums in self.sums.items()}


def score(
    model: ShardedModel,
    criterion: str,
    means: Mapping[str, Mapping[str, Tensor]],
    sigma: Mapping[Unit, float],
    seed: int,
    overwrite: bool = True,
) -> Scores:
    """Every shard's scores, from the mean gradients of ``safety`` and ``tuning`` that the criterion needs.

    means: fp32 [shard.numel] by objective and by shard's name. overwrite: whether the scores may take the place of the
    first of these that the criterion needs. No collectives.
    """
    scores: Scores = {}
    for shard in model.scored:
        gradients = {name: means[name][shard.name] for name in GRADIENTS[criterion]}
        if not overwrite:
            gradients |= {name: gradients[name].clone() for name in GRADIENTS[criterion][:1]}
        weight = model.local_weight(shard)
        scores[shard.name] = score_shard(
            criterion, shard, gradients.get("safety"), weight, sigma, seed, gradients.get("tuning")
        )
    return scores


def unit_means(model: ShardedModel, values: Mapping[str, Tensor]) -> dict[Unit, float]:
    """The mean absolute value over every logical matrix, in the model's order.

    values: fp32 [shard.numel] by shard's name. Sums are in float64. Collectives: one all-reduce of float64 [units].
    """
    units = [unit for parameter in model.parameters for unit in parameter.units]
    parts = {
        row: shard.elements(unit, values[shard.name]).abs().sum(dtype=torch.float64)
        for row, unit, shard in unit_shards(model)
    }
    totals = runtime.all_reduce_sum(with_rows(torch.zeros(len(units), dtype=torch.float64), parts)).tolist()
    return {unit: total / unit.numel for unit, total in zip(units, totals, strict=True)}


def model_mean(means: Mapping[Unit, float]) -> float:
    """The mean over all scored weights, from those of ``unit_means``."""
    return math.fsum(mean * unit.numel for unit, mean in means.items()) / sum(unit.numel for unit in means)


def normalise_by_matrix(model: ShardedModel, scores: Scores) -> None:
    """Divide every score by the mean score of its logical matrix, in place. A matrix whose scores are 0, or whose mean
    is below what float32 can be divided by, keeps them.

    Collectives: one all-reduce of float64 [units].
    """
    smallest = torch.finfo(torch.float32).tiny
    factors = {unit: 1 / mean if mean > smallest else 1.0 for unit, mean in unit_means(model, scores).items()}
    for shard in model.scored:
        scale_by_unit(shard, scores[shard.name], factors)


def contrast_denominators(model: ShardedModel, roots: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Overwrite ``roots``, which are sqrt(F), with sqrt(F) + median of sqrt(F), docs/method.md §2, and return them.

    roots: fp32 [shard.numel] by shard's name. The median is exact, over all scored weights of all ranks. Collectives:
    those of ``check_scores``, and three all-reduces of 16 KiB. Raises UserError for an F that is not finite.
    """
    check_scores(model, roots, "data.benign", "root mean squared gradient")
    num_scored = sum(parameter.numel for parameter in model.parameters if parameter.scored)
    middle = median(list(roots.values()), num_scored, runtime.all_reduce_sum)
    return {name: root.add_(middle) for name, root in roots.items()}


def contrast_scores(scores: Scores, denominators: Mapping[str, Tensor]) -> int:
    """Overwrite ``scores`` with score / denominator; returns the number of undefined scores over all ranks.

    denominators: of ``contrast_denominators``. Collectives: one all-reduce of a number.
    """
    undefined = [contrast(values, denominators[name]) for name, values in scores.items()]
    local = int(torch.stack(undefined).sum()) if undefined else 0
    return int(runtime.all_reduce_sum(torch.tensor(local)))


def silent_experts(rows: Iterable[UnitRow]) -> str | None:
    """A warning where all routed experts of a layer have a score of 0; None where there is no such layer.

    rows: of ``unit_rows``. Single experts may never be chosen, but where every expert of a layer scores exactly 0, no
    gradient reaches them: remote code may run experts under ``torch.no_grad`` unless the model trains.
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
        "its experts without gradients outside training?"
    )


@dataclass(frozen=True)
class Selection:
    """The weights of this rank that are selected, and the counts of the whole mask.

    bits: shard's name → bool [shard.numel]. counts: parameter's name → number of selected weights over all ranks. k:
    their sum. cut: the cut of the whole model's scores (scope ``model``), else None.
    """

    bits: dict[str, Tensor]
    counts: dict[str, int]
    k: int
    cut: Cut | None


def check_scores(model: ShardedModel, scores: Mapping[str, Tensor], field: str, kind: str = "score") -> None:
    """Refuse what cannot be ranked (docs/method.md §2): scores are finite and ≥ 0.

    scores: [shard.numel] by shard's name. field: the config key that names them. kind: what they are. Raises
    UserError naming parameter and flat index, on every rank. Collectives: one gather.
    """
    error: UserError | None = None
    shards = () if all_valid(scores[shard.name] for shard in model.scored) else model.scored
    for shard in shards:
        index = first_invalid(scores[shard.name])
        if index is not None:
            flat, value = int(shard.flat(torch.tensor([index]))[0]), float(scores[shard.name][index])
            problem = f"the {kind} of {shard.parameter.name}, flat index {flat}, is {value}"
            remedy = "it must be finite and at least 0: look at the data, and at the dtype of model and judge"
            error = UserError(field, None, problem, remedy)
            break
    runtime.raise_first(error)


def select_weights(
    model: ShardedModel,
    scores: Mapping[str, Tensor],
    *,
    ratio: float,
    order: str,
    of: str,
    scope: str,
    seed: int,
    k: int | None = None,
    field: str = "select.criterion",
) -> Selection:
    """The exact selection (docs/method.md §2). Raises UserError naming ``field`` as ``check_scores`` does.

    scores: on any device; this rank's device holds keys of a few of them at a time, and the bits lie beside the scores.
    k: with scope ``model``, how many weights to select; None: as many as ``ratio`` and ``of`` say.
    Collectives: those of ``check_scores``, one all-reduce of int64 [scored parameters], and those of
    ``core.select.select``: three all-reduces of a 16 KiB histogram and one more for every 11 bits of the largest
    position. Scope ``matrix`` performs the latter for each parameter, with a histogram for each unit.
    """
    check_scores(model, scores, field)
    ordering = Order(order, seed, runtime.device())
    scored = [parameter for parameter in model.parameters if parameter.scored]
    last = sum(parameter.numel for parameter in model.parameters) - 1
    bits: dict[str, Tensor] = {}
    cut = None
    if scope == "model":
        runs = {shard.name: list(score_runs(shard, scores[shard.name])) for shard in model.scored}
        k = model_k(model.parameters, ratio, of) if k is None else k
        (cut,) = select([list(chain.from_iterable(runs.values()))], [k], ordering, last, runtime.all_reduce_sum)
        for shard in model.scored:
            selected = [selected_bits(cut, ordering, run) for run in runs[shard.name]]
            empty = torch.zeros(0, dtype=torch.bool, device=scores[shard.name].device)
            bits[shard.name] = torch.cat([empty, *selected])
    else:
        for parameter in scored:
            bits |= _select_by_unit(model, parameter, scores, ratio, ordering, last)
    local = torch.zeros(len(scored), dtype=torch.int64)
    rows = {parameter.name: row for row, parameter in enumerate(scored)}
    sums = [bits[shard.name].sum() for shard in model.scored]
    if sums:  # read at once: a GPU is waited for once
        indices = torch.tensor([rows[shard.parameter.name] for shard in model.scored])
        local.index_add_(0, indices, torch.stack(sums).cpu())
    counts = runtime.all_reduce_sum(local).tolist()
    return Selection(bits, dict(zip(rows, counts, strict=True)), sum(counts), cut)


def score_runs(shard: Shard, scores: Tensor) -> Iterator[ScoreRun]:
    """The runs of a shard's ``scores`` [shard.numel]."""
    for where, low, _ in shard.parts():
        yield ScoreRun(scores[where], shard.parameter.offset + low)


def selected_bits(cut: Cut, order: Order, run: ScoreRun) -> Tensor:
    """bool [n], beside the run's n scores: which of them are selected."""
    bits = torch.empty(len(run.scores), dtype=torch.bool, device=run.scores.device)
    for keys, position in chunks([run], order):  # a random order's hashes take 32 bytes each
        start = position - run.position
        bits[start : start + len(keys)] = cut.selects(keys, position)
    return bits


def _select_by_unit(
    model: ShardedModel, parameter: Parameter, scores: Mapping[str, Tensor], ratio: float, order: Order, last: int
) -> dict[str, Tensor]:
    """Scope ``matrix``: ⌊ratio · n⌋ of the n weights of each logical matrix of one parameter.

    Returns the bits of this rank's shards of the parameter, by the shard's name. Collectives: those of ``select``.
    """
    shards = model.shards_of(parameter)
    bits = {
        shard.name: torch.zeros(shard.numel, dtype=torch.bool, device=scores[shard.name].device) for shard in shards
    }
    groups = []  # for every unit: (views of its bits, its scores) of every run of a shard
    for unit, offset in parameter.unit_offsets():
        group = []
        for shard in shards:
            for where, low, high in shard.parts():
                if unit.meets(low, high):
                    elements = unit.elements(scores[shard.name][where], low)
                    views = unit.views(bits[shard.name][where], low)
                    group.append((views, ScoreRun(elements, offset + unit.num_before(low))))
        groups.append(group)
    counts = [int(ratio * unit.numel) for unit in parameter.units]
    runs = [[run for _, run in group] for group in groups]
    for group, cut in zip(groups, select(runs, counts, order, last, runtime.all_reduce_sum), strict=True):
        for views, run in group:
            assign(views, selected_bits(cut, order, run))
    return bits

"""SET: train the selected weights only, at little more than the cost of holding the model (docs/zero3.md).

An engine without optimizer; fp32 masters and moments of this rank's trained weights lie in flat tensors. Two ways for a
gradient to get there, chosen by size:

``compact``: the hook keeps the trained coordinates of the whole, unreduced gradient, without a collective; one
all-reduce a step (and one of experts, where ranks hold different ones). Index and sums are not sharded: 8 bytes per
trained weight on every rank.
``scatter``: the hook reduce-scatters the whole gradient, as scoring does, and keeps this rank's trained coordinates.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from esi_ds.core.adamw import adamw, clip_factor
from esi_ds.core.footprint import COMPACT_LIMIT
from esi_ds.core.trained import Trained
from esi_ds.core.units import Shard
from esi_ds.zero import runtime
from esi_ds.zero.checkpoint import Parts
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.gradients import ReducedGradients
from esi_ds.zero.tuner import NotFinite, Rule, Tuner


def choose_reduction(total: int, reduction: str) -> tuple[str, str]:
    """(``compact`` or ``scatter``, a sentence that says why) for ``total`` trained weights."""
    size = 8 * total
    reason = f"index and sums of {total:,} trained weights take {size / 2**30:.3g} GiB on every rank"
    if reduction == "auto":
        return ("compact" if size <= COMPACT_LIMIT else "scatter"), reason
    return reduction, f"set by tune.reduction; {reason}"


class CompactGradients:
    """Sums of the trained coordinates of every tensor's gradient, laid out alike on all ranks it is cut over.

    ``sums`` fp32 [trained weights here, tensors that are cut over all ranks first]; ``ranges``: the part of it that is
    this rank's to train, by shard's name.
    """

    def __init__(self, model: ShardedModel, trained: Trained, shards: Sequence[Shard]):
        device = runtime.device()
        self._by_tensor: dict[nn.Parameter, tuple[Tensor | None, slice]] = {}
        names = {shard.name for shard in shards}
        self._others = [tensor for name, tensor in model.by_name.items() if name not in names]
        self._places: dict[torch.distributed.ProcessGroup | None, slice] = {}  # None: all ranks
        places: dict[str, slice] = {}
        start = 0
        layouts = [layout for layout in model.layouts if layout.name in names]
        for layout in sorted(layouts, key=lambda layout: not model.is_everywhere(layout)):
            positions = trained.positions_of(layout)
            count = layout.numel if positions is None else len(positions)
            place = places[layout.name] = slice(start, start + count)
            self._by_tensor[model.by_name[layout.name]] = (
                None if positions is None else positions.to(device),
                place,
            )
            group = None if model.is_everywhere(layout) else model.group(layout)
            self._places[group] = slice(self._places.get(group, place).start, place.stop)
            start += count
        self.ranges = {shard.name: self._own(model, shard, places[shard.name]) for shard in shards}
        self.sums = torch.zeros(start, dtype=torch.float32, device=device)

    def _own(self, model: ShardedModel, shard: Shard, place: slice) -> slice:
        """This rank's part of a tensor's place in ``sums``."""
        index, _ = self._by_tensor[model.by_name[shard.name]]
        if index is None:
            return slice(*(min(place.start + bound, place.stop) for bound in model.bounds(shard)))
        first, last = (int((index < bound).sum()) for bound in model.bounds(shard))
        return slice(place.start + first, place.start + last)

    def positions(self, model: ShardedModel, shard: Shard) -> Tensor | None:
        """This rank's trained positions in a shard; None: all of it."""
        index, place = self._by_tensor[model.by_name[shard.name]]
        if index is None:
            return None
        own = self.ranges[shard.name]
        first, _ = model.bounds(shard)
        return index[own.start - place.start : own.stop - place.start].long() - first

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Hooks live inside the block; tensors in which nothing trains get no gradient at all."""
        for tensor in self._others:
            tensor.requires_grad_(False)
        handles = []
        for tensor in self._by_tensor:
            tensor.requires_grad_(True)
            tensor.grad = None
            handles.append(tensor.register_post_accumulate_grad_hook(self._collect))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _collect(self, tensor: nn.Parameter) -> None:
        index, place = self._by_tensor[tensor]
        gradient, tensor.grad = tensor.grad.detach().reshape(-1), None
        self.sums[place] += gradient if index is None else gradient.index_select(0, index)

    def flush(self) -> None:
        """Nothing waits here."""

    def own_finite(self) -> bool:
        """Whether this rank's own gradients, before they are reduced, are finite."""
        return math.isfinite(_norm(self.sums))

    def reduce(self) -> tuple[Tensor, float]:
        """This rank's part of the summed gradient, and the norm of all of it. One all-reduce a group of ranks, and one
        of a number where experts are on different ranks."""
        for group, place in self._places.items():
            if torch.distributed.get_world_size(group) > 1:
                torch.distributed.all_reduce(self.sums[place], group=group)
        own = torch.cat([self.sums[place] for place in self.ranges.values()])
        if set(self._places) == {None}:  # every rank has all sums; one group of experts is of some ranks only
            return own, _norm(self.sums)
        norm_squared = torch.tensor(_norm(own) ** 2, dtype=torch.float64)
        return own, math.sqrt(runtime.all_reduce_sum(norm_squared))

    def zero(self) -> None:
        self.sums.zero_()


def _norm(values: Tensor) -> float:
    """Summed in float64."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


class ScatteredGradients(ReducedGradients):
    """Sums of this rank's trained coordinates; each gradient is reduce-scattered whole as it appears."""

    def __init__(self, model: ShardedModel, trained: Trained, shards: Sequence[Shard]):
        super().__init__(model, shards)
        device = runtime.device()
        self._positions: dict[str, Tensor | None] = {}
        self.ranges: dict[str, slice] = {}
        start = 0
        for shard in shards:
            positions = trained.positions_of(shard)
            self._positions[shard.name] = None if positions is None else positions.to(device)
            count = shard.numel if positions is None else len(positions)
            self.ranges[shard.name] = slice(start, start + count)
            start += count
        self.sums = torch.zeros(start, dtype=torch.float32, device=device)

    def positions(self, model: ShardedModel, shard: Shard) -> Tensor | None:
        """This rank's trained positions in a shard; None: all of it."""
        found = self._positions[shard.name]
        return None if found is None else found.long()

    def receive(self, shard: Shard, local: Tensor) -> None:
        index = self._positions[shard.name]
        self.sums[self.ranges[shard.name]] += local if index is None else local.index_select(0, index)

    def own_finite(self) -> bool:
        """The sums hold every rank's gradients: nobody in particular can be named."""
        return True

    def reduce(self) -> tuple[Tensor, float]:
        """Already reduced; one all-reduce of the squared norm."""
        norm_squared = torch.tensor(_norm(self.sums) ** 2, dtype=torch.float64)
        return self.sums.clone(), math.sqrt(runtime.all_reduce_sum(norm_squared))

    def zero(self) -> None:
        self.sums.zero_()


class SparseTuner(Tuner):
    """AdamW on the trained weights of this rank's shards; state in flat fp32 tensors, parameter after parameter."""

    def __init__(self, model: ShardedModel, trained: Trained, rule: Rule, reduction: str):
        super().__init__(model, trained)
        self.rule, self.num_steps = rule, 0
        kind = CompactGradients if reduction == "compact" else ScatteredGradients
        self.gradients = kind(model, trained, self.shards)
        self._places: dict[str, slice] = {}
        start = 0
        for shard in self.shards:
            own = self.gradients.ranges[shard.name]
            self._places[shard.name] = slice(start, start + own.stop - own.start)
            start += own.stop - own.start
        self.state = {
            what: torch.zeros(start, dtype=torch.float32, device=runtime.device())
            for what in ("master", "exp_avg", "exp_avg_sq")
        }
        for shard in self.shards:
            weight = model.local_weight(shard)
            positions = self.gradients.positions(model, shard)
            picked = weight if positions is None else weight[positions.to(weight.device)]
            self.state["master"][self._places[shard.name]] = picked.to(self.state["master"])

    @contextmanager
    def running(self) -> Iterator[None]:
        with self.gradients.collecting():
            yield

    def forward(self, batch: Mapping[str, Tensor], num_logits: int) -> Tensor:
        return self.model.module(**batch, use_cache=False, logits_to_keep=num_logits).logits

    def backward(self, loss: Tensor) -> None:
        """Collectives: the model's gathers, and in mode ``scatter`` the reduce-scatters."""
        loss.backward()
        self.gradients.flush()
        # Some modules' post-backward hooks never fire; a parameter still gathered would hide what is written below.
        self.model.release()

    def step(self, lr: float) -> float:
        finite = self.gradients.own_finite()
        gradient, norm = self.gradients.reduce()
        if not math.isfinite(norm):
            raise NotFinite([rank for rank, good in enumerate(runtime.gather_objects(finite)) if not good])
        factor = clip_factor(norm, self.rule.clip)
        if factor is not None:
            gradient.mul_(factor)
        self.num_steps += 1
        state = self.state
        adamw(
            state["master"],
            gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            step=self.num_steps,
            lr=lr,
            betas=self.rule.betas,
            eps=self.rule.eps,
            weight_decay=self.rule.weight_decay,
        )
        self.gradients.zero()
        self._write_back()
        return norm

    @torch.no_grad()
    def _write_back(self) -> None:
        """Masters into the partitions, by index; frozen weights are not touched. The model must be released."""
        for shard in self.shards:
            weight = self.model.local_weight(shard)
            values = self.state["master"][self._places[shard.name]].to(weight)
            positions = self.gradients.positions(self.model, shard)
            if positions is None:
                weight.copy_(values)
            else:
                weight.index_copy_(0, positions.to(weight.device), values)
        self.model.publish()

    def saved(self) -> Parts:
        parts: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
        for shard in self.shards:
            for what, values in self.state.items():
                found = self.trained.segments(shard, values[self._places[shard.name]])
                parts[f"{shard.parameter.name}/{what}"] += found
        return parts

    def restored(self, step: int) -> None:
        self.num_steps = step
        self.model.release()
        self._write_back()

"""SET: train the selected weights only, at little more than the cost of holding the model (docs/zero3.md).

The engine has no optimizer; fp32 masters and moments of this rank's trained weights lie in flat tensors. Gradients
reach them in one of two ways, chosen by size:

``compact``: the hook keeps the trained coordinates of the whole, unreduced gradient, without a collective. Each step
performs one all-reduce, and one more for experts where ranks hold different ones. Positions and sums are not sharded: 8
bytes per trained weight on every rank.
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
from esi_ds.core.footprint import reduces_compactly
from esi_ds.core.trained import Trained
from esi_ds.core.units import Shard
from esi_ds.models.rows import last_logits
from esi_ds.zero import memory, runtime
from esi_ds.zero.checkpoint import TensorParts
from esi_ds.zero.engine import ShardedModel
from esi_ds.zero.gradients import ReducedGradients, take_gradient
from esi_ds.zero.tuner import STATE, NotFinite, Rule, Tuner


def choose_reduction(total: int, reduction: str) -> tuple[str, str]:
    """(``compact`` or ``scatter``, the reason) for ``total`` trained weights. reduction: ``tune.reduction``."""
    reason = f"index and sums of {total:,} trained weights take {8 * total / 2**30:.3g} GiB on every rank"
    if reduction != "auto":
        reason = f"set by tune.reduction; {reason}"
    return ("compact" if reduces_compactly(total, reduction) else "scatter"), reason


class CompactGradients:
    """Sums of the trained coordinates of whole gradients, in the same layout on all ranks of a tensor's group.

    sums: fp32 [trained weights of all layouts], tensors partitioned over all ranks first. ranges: the part of ``sums``
    that this rank trains, by shard's name.
    """

    def __init__(self, model: ShardedModel, trained: Trained, shards: Sequence[Shard]):
        device = runtime.device()
        self._by_tensor: dict[nn.Parameter, tuple[Tensor | None, slice]] = {}
        shard_of = {shard.name: shard for shard in shards}
        self._others = [tensor for name, tensor in model.by_name.items() if name not in shard_of]
        self._group_ranges: dict[torch.distributed.ProcessGroup | None, slice] = {}  # None: all ranks
        ranges: dict[str, slice] = {}
        start = 0
        layouts = [layout for layout in model.layouts if layout.name in shard_of]
        for layout in sorted(layouts, key=lambda layout: not model.is_everywhere(layout)):
            positions = trained.positions_of(layout)
            count = layout.numel if positions is None else len(positions)
            layout_range = slice(start, start + count)
            self._by_tensor[model.by_name[layout.name]] = (
                None if positions is None else positions.to(device),
                layout_range,
            )
            bounds = model.bounds(shard_of[layout.name])
            ranges[layout.name] = _range_within(layout, bounds, positions, layout_range)
            group = None if model.is_everywhere(layout) else model.group(layout)
            first = self._group_ranges.get(group, layout_range).start
            self._group_ranges[group] = slice(first, layout_range.stop)
            start += count
        self.ranges = {shard.name: ranges[shard.name] for shard in shards}  # in the shards' order, as masters lie
        self.sums = torch.zeros(start, dtype=torch.float32, device=device)

    def positions(self, model: ShardedModel, shard: Shard) -> Tensor | None:
        """Trained positions in one of this rank's shards, int64; None: all of them."""
        index, layout_range = self._by_tensor[model.by_name[shard.name]]
        if index is None:
            return None
        trained, offset = self.ranges[shard.name], layout_range.start
        first, _ = model.bounds(shard)
        return index[trained.start - offset : trained.stop - offset].long() - first

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Hooks are active inside the block, and only tensors with a trained weight get a gradient."""
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
        """Post-accumulate hook. No collectives."""
        index, layout_range = self._by_tensor[tensor]
        gradient = take_gradient(tensor)
        self.sums[layout_range] += gradient if index is None else gradient.index_select(0, index)

    def flush(self) -> None:
        """Nothing to do: the hooks perform no collectives."""

    def local_finite(self) -> bool:
        """Whether this rank's gradients are finite before they are reduced."""
        return math.isfinite(_norm(self.sums))

    def reduce(self) -> tuple[Tensor, float]:
        """This rank's part of the summed gradient, fp32 [trained weights of its shards], and the norm of the whole.

        Collectives: one all-reduce per group of ranks, and one of a number where ranks hold different experts.
        """
        for group, group_range in self._group_ranges.items():
            if torch.distributed.get_world_size(group) > 1:
                torch.distributed.all_reduce(self.sums[group_range], group=group)
        local = torch.cat([self.sums[shard_range] for shard_range in self.ranges.values()])
        if set(self._group_ranges) == {None}:  # every rank has all sums
            return local, _norm(self.sums)
        norm_squared = torch.tensor(_norm(local) ** 2, dtype=torch.float64)
        return local, math.sqrt(runtime.all_reduce_sum(norm_squared))

    def zero(self) -> None:
        self.sums.zero_()


def _range_within(layout: Shard, bounds: tuple[int, int], positions: Tensor | None, layout_range: slice) -> slice:
    """The part of a tensor's range in the sums that lies within ``bounds``, a rank's partition of it.

    positions: the tensor's trained ones, ascending, on the CPU; None: all of them.
    """
    first, last = (min(bound, layout.numel) for bound in bounds)
    if positions is not None:
        first, last = torch.searchsorted(positions, torch.tensor([first, last], dtype=positions.dtype)).tolist()
    return slice(layout_range.start + first, layout_range.start + last)


def _norm(values: Tensor) -> float:
    """The norm, summed in float64."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


class ScatteredGradients(ReducedGradients):
    """Sums of this rank's trained coordinates; each whole gradient is reduce-scattered as it arrives.

    sums, ranges: as in ``CompactGradients``, for this rank's shards only.
    """

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
        """Trained positions in one of this rank's shards, int64; None: all of them."""
        positions = self._positions[shard.name]
        return None if positions is None else positions.long()

    def receive(self, shard: Shard, local: Tensor) -> None:
        index = self._positions[shard.name]
        self.sums[self.ranges[shard.name]] += local if index is None else local.index_select(0, index)

    def local_finite(self) -> bool:
        """True: the sums hold every rank's gradients, so no rank can be named."""
        return True

    def reduce(self) -> tuple[Tensor, float]:
        """As in ``CompactGradients``. Collectives: one all-reduce of the squared norm."""
        norm_squared = torch.tensor(_norm(self.sums) ** 2, dtype=torch.float64)
        return self.sums.clone(), math.sqrt(runtime.all_reduce_sum(norm_squared))

    def zero(self) -> None:
        self.sums.zero_()


class SparseTuner(Tuner):
    """AdamW on the trained weights of this rank's shards, with its state in flat fp32 tensors in the shards' order.

    Collectives of the constructor: one gather.
    """

    def __init__(self, model: ShardedModel, trained: Trained, rule: Rule, reduction: str):
        super().__init__(model, trained)
        self.rule, self.num_steps = rule, 0
        gradients_class = CompactGradients if reduction == "compact" else ScatteredGradients
        self.gradients = gradients_class(model, trained, self.shards)
        self._state_ranges: dict[str, slice] = {}
        start = 0
        for shard in self.shards:
            sums_range = self.gradients.ranges[shard.name]
            count = sums_range.stop - sums_range.start
            self._state_ranges[shard.name] = slice(start, start + count)
            start += count
        self.state = {key: torch.zeros(start, dtype=torch.float32, device=runtime.device()) for key in STATE}
        self._offloaded_positions: dict[str, Tensor] = {}  # for weights on the CPU beside gradients on a GPU
        run_counts: list[list[int]] = []
        for shard in self.shards:
            weight = model.local_weight(shard)
            positions = self.gradients.positions(model, shard)
            if positions is not None and positions.device != weight.device:
                positions = self._offloaded_positions[shard.name] = positions.to(weight.device)
            picked = weight if positions is None else weight[positions]
            self.state["master"][self._state_ranges[shard.name]] = picked.to(self.state["master"])
            run_counts.append(_run_counts(shard, positions))
        self._parts = _state_parts(self.shards, run_counts)

    def _positions(self, shard: Shard) -> Tensor | None:
        """Trained positions in one shard, int64, where its weights are; None: all of them."""
        offloaded = self._offloaded_positions.get(shard.name)
        return self.gradients.positions(self.model, shard) if offloaded is None else offloaded

    @contextmanager
    def running(self) -> Iterator[None]:
        with self.gradients.collecting():
            yield

    def forward(self, batch: Mapping[str, Tensor], num_logits: int) -> Tensor:
        return last_logits(self.model.module, batch, num_logits)

    def backward(self, loss: Tensor) -> None:
        """See ``Tuner``. Collectives: the model's gathers, and with ``scatter`` the reduce-scatters."""
        loss.backward()
        self.gradients.flush()
        # Some modules' post-backward hooks never fire, and a gathered parameter would hide its shard.
        self.model.release()

    def step(self, lr: float) -> float:
        finite = self.gradients.local_finite()
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
        """Write masters into the partitions; frozen weights are not written. The model must be released.

        All masters are rounded, and moved where weights are offloaded, in one piece: a GPU is waited for once.
        """
        rounded: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        for shard in self.shards:
            weight = self.model.local_weight(shard)
            kind = (weight.device, weight.dtype)
            if kind not in rounded:
                rounded[kind] = self.state["master"].to(weight)
            values = rounded[kind][self._state_ranges[shard.name]]
            positions = self._positions(shard)
            if positions is None:
                weight.copy_(values)
            else:
                weight.index_copy_(0, positions, values)
        self.model.publish()

    def saved(self) -> TensorParts:
        return {
            f"{name}/{key}": [(first, values[where]) for first, where in parts]
            for name, parts in self._parts.items()
            for key, values in self.state.items()
        }

    def close(self) -> None:
        self.state.clear()
        self._watched.clear()
        del self.gradients
        memory.collect()

    def restored(self, step: int) -> None:
        self.num_steps = step
        self.model.release()
        self._write_back()


def _run_counts(shard: Shard, positions: Tensor | None) -> list[int]:
    """Number of trained weights in every run of a shard. positions: of these in the shard, int64; None: all of them."""
    ends = torch.tensor([0, *(where.stop for where, _, _ in shard.parts())], dtype=torch.int64)
    return (ends if positions is None else torch.searchsorted(positions, ends.to(positions.device))).diff().tolist()


def _state_parts(shards: Sequence[Shard], run_counts: Sequence[Sequence[int]]) -> dict[str, list[tuple[int, slice]]]:
    """Parameter's name → (its trained weights before the run, place in the state) of every run on this rank.

    What comes before a run lies on other ranks, too. They exchange the numbers of their runs, because counting in the
    mask would take all of a parameter's bits up to every run. run_counts: trained weights in every run of each shard.
    One gather.
    """
    rows = [
        (shard.parameter.offset + low, count)
        for shard, counts in zip(shards, run_counts, strict=True)
        for (low, _), count in zip(shard.runs, counts, strict=True)
    ]
    gathered = torch.cat(runtime.gather_objects(torch.tensor(rows, dtype=torch.int64).view(-1, 2)))
    runs, trained = gathered[gathered[:, 0].argsort()].T.contiguous()  # positions of all runs in the model, ascending
    before = torch.cat([trained.new_zeros(1), trained.cumsum(0)])
    parts: dict[str, list[tuple[int, slice]]] = defaultdict(list)
    start = 0
    for shard, counts in zip(shards, run_counts, strict=True):
        lows = torch.tensor([0, *(low for low, _ in shard.runs)], dtype=torch.int64) + shard.parameter.offset
        earlier, *firsts = before[torch.searchsorted(runs, lows)].tolist()  # earlier: of the parameters before this one
        for first, count in zip(firsts, counts, strict=True):
            parts[shard.parameter.name].append((first - earlier, slice(start, start + count)))
            start += count
    return parts

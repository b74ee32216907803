"""Logical matrices: the parts of a parameter that the method treats as one matrix (docs/method.md §1).

A runtime tensor may pack several matrices (fused experts, fused qkv, fused gate_up). Each of them is a regular pattern
of flat positions: ``count`` runs of ``length`` elements, ``stride`` apart, from ``start``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Unit:
    """One logical matrix inside one parameter.

    Flat positions (row-major, in the whole parameter): ``start + i * stride + j`` for i < count, j < length.
    """

    name: str
    role: str
    layer: int | None
    expert: int | None
    start: int
    length: int
    count: int = 1
    stride: int = 0

    @property
    def numel(self) -> int:
        return self.length * self.count

    @property
    def end(self) -> int:
        """Flat position after the last element."""
        return self.start + (self.count - 1) * self.stride + self.length

    def meets(self, low: int, high: int) -> bool:
        """Whether the unit may have elements in the flat range [low, high)."""
        return low < self.end and self.start < high

    def num_before(self, low: int) -> int:
        """Number of the unit's elements before flat position ``low``."""
        before = max(0, low - self.start)
        if self.count == 1:
            return min(before, self.length)
        runs, rest = divmod(before, self.stride)
        return min(runs * self.length + min(rest, self.length), self.numel)

    def views(self, values: Tensor, low: int = 0) -> list[Tensor]:
        """The unit's elements in ``values``, as views in the order of their positions; [] if there are none.

        values: 1-D, for the parameter's flat positions from ``low`` on. At most three views: whole runs are one of
        [runs, length], a run that either end of ``values`` cuts is one of [elements]. No index is built, so that
        ``values`` may lie on any device.
        """
        first, last = self.num_before(low), self.num_before(low + len(values))
        if first == last:
            return []
        if self.count == 1:
            begin = self.start + first - low
            return [values[begin : begin + last - first]]
        views = []
        (run, skipped), (last_run, rest) = divmod(first, self.length), divmod(last, self.length)
        if skipped:
            begin = self.start + run * self.stride + skipped - low
            views.append(values[begin : begin + min(self.length - skipped, last - first)])
            run += 1
        if run < last_run:
            begin = self.start + run * self.stride - low
            spanned = (last_run - 1 - run) * self.stride + self.length
            views.append(values[begin : begin + spanned].unfold(0, self.length, self.stride))
        if rest and run <= last_run:
            begin = self.start + last_run * self.stride - low
            views.append(values[begin : begin + rest])
        return views

    def elements(self, values: Tensor, low: int = 0) -> Tensor:
        """The unit's elements in ``values``, 1-D: a view where they are contiguous, else a copy. See ``views``."""
        return joined(self.views(values, low), values)


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model, its position in the model's order, and its logical matrices.

    offset: number of weights in all parameters before it, so ``offset + flat index`` is a weight's global position, the
    second key of the selection order. role: see ``models.roles``. units: empty where the parameter is not scored.
    block: name of the block with a list of experts that it is in, which ZeRO-3 gathers as one; None elsewhere.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    role: str
    units: tuple[Unit, ...]
    block: str | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def scored(self) -> bool:
        return bool(self.units)

    def unit_offsets(self) -> Iterator[tuple[Unit, int]]:
        """Units, each with the global position its first element would have if units were laid out consecutively."""
        offset = self.offset
        for unit in self.units:
            yield unit, offset
            offset += unit.numel


@dataclass(frozen=True)
class Shard:
    """The elements of one parameter that a flat tensor holds, in the tensor's order, without padding.

    runs: ranges [low, high) of flat positions in the whole parameter, consecutive in the tensor. There is one run where
    ZeRO-3 partitions the parameter itself, and several where expert parallelism packs one matrix of each of a rank's
    experts. name: the tensor's; the parameter's where one tensor holds all of it.
    """

    parameter: Parameter
    runs: tuple[tuple[int, int], ...]
    name: str

    @property
    def numel(self) -> int:
        return sum(high - low for low, high in self.runs)

    def parts(self) -> Iterator[tuple[slice, int, int]]:
        """(slice of the tensor, low, high) of every run."""
        start = 0
        for low, high in self.runs:
            yield slice(start, start + high - low), low, high
            start += high - low

    def cut(self, first: int, last: int) -> Shard:
        """Elements [first, last) of the tensor; bounds beyond its end are clipped."""
        runs = []
        for where, low, _ in self.parts():
            begin, end = max(first, where.start), min(last, where.stop)
            if begin < end:
                runs.append((low + begin - where.start, low + end - where.start))
        return Shard(self.parameter, tuple(runs), self.name)

    def views(self, unit: Unit, values: Tensor) -> list[Tensor]:
        """A unit's elements in ``values`` [numel], as views in the tensor's order; see ``Unit.views``."""
        return [
            view
            for where, low, high in self.parts()
            if unit.meets(low, high)
            for view in unit.views(values[where], low)
        ]

    def elements(self, unit: Unit, values: Tensor) -> Tensor:
        """A unit's elements in ``values`` [numel], 1-D: a view where they are contiguous, else a copy."""
        return joined(self.views(unit, values), values)

    def flat(self, positions: Tensor) -> Tensor:
        """Flat positions in the whole parameter, int64, of int64 ``positions`` in the tensor."""
        if len(self.runs) == 1:
            return self.runs[0][0] + positions
        starts = torch.tensor([where.start for where, _, _ in self.parts()], device=positions.device)
        lows = torch.tensor([low for low, _ in self.runs], device=positions.device)
        run = torch.bucketize(positions, starts, right=True) - 1
        return positions - starts[run] + lows[run]


def joined(views: Sequence[Tensor], source: Tensor) -> Tensor:
    """The elements of ``views`` of ``source`` one after another, 1-D: no copy where there is one view of one run."""
    flat = [view.reshape(-1).contiguous() for view in views]  # a sum over strides would be rounded in another order
    return flat[0] if len(flat) == 1 else torch.cat([source[:0], *flat])


def assign(views: Iterable[Tensor], values: Tensor) -> None:
    """Write ``values``, 1-D, into views that have as many elements together, in order."""
    start = 0
    for view in views:
        view.copy_(values[start : start + view.numel()].view_as(view))
        start += view.numel()


def whole(parameter: Parameter) -> Shard:
    """The shard of a tensor that holds a whole parameter."""
    return Shard(parameter, ((0, parameter.numel),), parameter.name)

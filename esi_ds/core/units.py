"""Logical matrices: the parts of a parameter that are one matrix to the method (docs/method.md §1).

A runtime tensor may pack several matrices (fused experts, fused qkv, fused gate_up). Every one of them is a
regular pattern of flat positions: ``count`` runs of ``length`` elements, ``stride`` apart, from ``start``.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        """Flat position behind the last element."""
        return self.start + (self.count - 1) * self.stride + self.length

    def meets(self, low: int, high: int) -> bool:
        """Whether the unit may have elements in the flat range [low, high)."""
        return low < self.end and self.start < high

    def num_before(self, low: int) -> int:
        """How many of the unit's elements lie in front of flat position ``low``."""
        before = max(0, low - self.start)
        if self.count == 1:
            return min(before, self.length)
        runs, rest = divmod(before, self.stride)
        return min(runs * self.length + min(rest, self.length), self.numel)

    def within(self, low: int, high: int) -> slice | Tensor:
        """Where this unit lies in the flat slice [low, high) of its parameter, relative to ``low``.

        Returns a slice for a contiguous unit, otherwise an int64 index tensor; either may be empty.
        """
        first, last = max(low, self.start), max(low, min(high, self.end))
        if self.count == 1:
            return slice(min(first, last) - low, last - low)
        positions = torch.arange(first, max(first, last), dtype=torch.int64)
        return positions[(positions - self.start) % self.stride < self.length] - low


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model: where it stands in the model's order and what it is cut into.

    ``offset`` is the number of weights in all parameters before it, so ``offset + flat index`` is a weight's
    global position, the second key of the selection order. ``units`` is empty where nothing is scored.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    role: str
    units: tuple[Unit, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def scored(self) -> bool:
        return bool(self.units)

    def unit_offsets(self) -> Iterator[tuple[Unit, int]]:
        """Units, each with a global position of its first element when units lie one behind another."""
        offset = self.offset
        for unit in self.units:
            yield unit, offset
            offset += unit.numel


@dataclass(frozen=True)
class Shard:
    """The elements of one parameter that a flat tensor holds, in the tensor's order; never any padding.

    runs: [low, high) of flat positions in the whole parameter, one behind another in the tensor. One run where ZeRO-3
    cuts the parameter itself; several where expert parallelism packs one matrix of each of a rank's experts. name: the
    tensor's own, where a rank holds a parameter in more than one; the parameter's otherwise.
    """

    parameter: Parameter
    runs: tuple[tuple[int, int], ...]
    name: str

    @property
    def numel(self) -> int:
        return sum(high - low for low, high in self.runs)

    def parts(self) -> Iterator[tuple[slice, int, int]]:
        """(where in the tensor, low, high) of every run."""
        start = 0
        for low, high in self.runs:
            yield slice(start, start + high - low), low, high
            start += high - low

    def cut(self, first: int, last: int) -> Shard:
        """Elements [first, last) of the tensor, as ZeRO-3 cuts it: bounds beyond the end are the end."""
        runs = []
        for where, low, _ in self.parts():
            begin, end = max(first, where.start), min(last, where.stop)
            if begin < end:
                runs.append((low + begin - where.start, low + end - where.start))
        return Shard(self.parameter, tuple(runs), self.name)

    def within(self, unit: Unit) -> slice | Tensor:
        """Where a unit's elements lie in the tensor: a slice if they are contiguous, else int64 positions."""
        found: list[slice | Tensor] = []
        for where, low, high in self.parts():
            if unit.meets(low, high):
                part = unit.within(low, high)
                if isinstance(part, slice):
                    found.append(slice(where.start + part.start, where.start + part.stop))
                else:
                    found.append(where.start + part)
        if len(found) < 2:
            return found[0] if found else slice(0, 0)
        return torch.cat([torch.arange(p.start, p.stop) if isinstance(p, slice) else p for p in found])

    def flat(self, positions: Tensor) -> Tensor:
        """int64 flat positions in the whole parameter of ``positions`` in the tensor."""
        if len(self.runs) == 1:
            return self.runs[0][0] + positions
        starts = torch.tensor([where.start for where, _, _ in self.parts()], device=positions.device)
        lows = torch.tensor([low for low, _ in self.runs], device=positions.device)
        run = torch.bucketize(positions, starts, right=True) - 1
        return positions - starts[run] + lows[run]


def whole(parameter: Parameter) -> Shard:
    """All of a parameter, in one tensor."""
    return Shard(parameter, ((0, parameter.numel),), parameter.name)


def shard_bounds(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """ZeRO-3's cut: slices of ceil(numel / world_size); the last ones may be short or empty."""
    size = -(-numel // world_size)
    low = min(rank * size, numel)
    return low, min(low + size, numel)

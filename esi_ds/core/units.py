"""Logical matrices: the parts of a parameter that are one matrix to the method (METHOD §1).

A runtime tensor may pack several matrices (fused experts, fused qkv, fused gate_up). Every one of them is a
regular pattern of flat positions: ``count`` runs of ``length`` elements, ``stride`` apart, from ``start``.
"""

from __future__ import annotations

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

    def within(self, low: int, high: int) -> slice | Tensor:
        """Where this unit lies in the flat slice [low, high) of its parameter, relative to ``low``.

        Returns a slice for a contiguous unit, otherwise an int64 index tensor; either may be empty.
        """
        end = self.start + (self.count - 1) * self.stride + self.length
        first, last = max(low, self.start), max(low, min(high, end))
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


@dataclass(frozen=True)
class Shard:
    """One rank's valid part of one parameter: flat elements [low, high) of the whole; never any padding."""

    parameter: Parameter
    low: int
    high: int

    @property
    def numel(self) -> int:
        return self.high - self.low


def shard_bounds(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """ZeRO-3's cut: slices of ceil(numel / world_size); the last ones may be short or empty."""
    size = -(-numel // world_size)
    low = min(rank * size, numel)
    return low, min(low + size, numel)

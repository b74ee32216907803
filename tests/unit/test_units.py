"""Shards of several runs, as expert parallelism lays them, against plain lists of positions."""

from __future__ import annotations

import random

import pytest
import torch

from esi_ds.core.units import Parameter, Shard, Unit, whole
from esi_ds.zero.expert_parallel import expert_runs


def positions_of(unit: Unit) -> list[int]:
    return [unit.start + i * unit.stride + j for i in range(unit.count) for j in range(unit.length)]


def fused(experts: int, size: int) -> Parameter:
    """[E, 2, size]: gate and up of each expert, one behind another."""
    units = tuple(
        Unit(f"p[{e}].{part}", f"expert.{part}", 0, e, (2 * e + half) * size, size)
        for e in range(experts)
        for half, part in enumerate(("gate", "up"))
    )
    return Parameter("p", (experts, 2, size), 1000, "expert", units)


@pytest.mark.parametrize("seed", range(20))
def test_cuts_units_and_positions(seed: int) -> None:
    draw = random.Random(seed)
    experts, size = draw.randint(1, 6), draw.randint(1, 9)
    parameter = fused(experts, size)
    local = sorted(draw.sample(range(experts), draw.randint(1, experts)))
    layout = Shard(parameter, expert_runs(parameter, draw.choice(["expert.gate", "expert.up"]), local), "p.w")
    flat = [position for low, high in layout.runs for position in range(low, high)]
    assert layout.numel == len(flat) == len(local) * size
    first, last = draw.randint(0, len(flat)), draw.randint(0, len(flat) + 5)
    shard, expected = layout.cut(first, last), flat[first:last]
    assert shard.numel == len(expected)
    assert shard.flat(torch.arange(shard.numel)).tolist() == expected
    assert [p for where, low, high in shard.parts() for p in range(low, high)] == expected
    for unit in parameter.units:
        inside = set(positions_of(unit))
        selected = torch.arange(shard.numel)[shard.within(unit)].tolist()
        assert selected == [index for index, position in enumerate(expected) if position in inside]


@pytest.mark.parametrize("seed", range(10))
def test_units_that_alternate(seed: int) -> None:
    """gpt-oss' way of packing: within one run, and counted up to any position."""
    draw = random.Random(seed)
    length, count, gap = draw.randint(1, 3), draw.randint(1, 5), draw.randint(0, 3)
    unit = Unit("u", "other", None, None, draw.randint(0, 4), length, count, length + gap)
    positions, numel = positions_of(unit), unit.end + 4
    assert unit.end == positions[-1] + 1
    for low in range(numel):
        assert unit.num_before(low) == sum(position < low for position in positions)
        shard = whole(Parameter("p", (numel,), 0, "other", (unit,))).cut(low, low + 5)
        selected = torch.arange(shard.numel)[shard.within(unit)].tolist()
        assert selected == [position - low for position in positions if low <= position < low + 5]
        assert unit.meets(low, low + 5) or not selected


def test_runs_that_touch_are_one() -> None:
    """Down projections lie one behind another: those of neighbouring experts are one run."""
    units = tuple(Unit(f"d[{e}]", "expert.down", 0, e, 4 * e, 4) for e in range(6))
    assert expert_runs(Parameter("d", (6, 4), 0, "expert", units), "expert.down", {1, 2, 5}) == ((4, 12), (20, 24))
    assert len(expert_runs(fused(6, 4), "expert.gate", {1, 2, 5})) == 3

"""Shards of several runs, as expert parallelism lays them, against plain lists of positions."""

from __future__ import annotations

import random

import pytest
import torch
from builders import shard_bounds
from torch import Tensor

from esi_ds.core.moments import moments
from esi_ds.core.score import score_shard
from esi_ds.core.units import Parameter, Shard, Unit, assign, whole
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
        selected = shard.elements(unit, torch.arange(shard.numel)).tolist()
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
        selected = shard.elements(unit, torch.arange(shard.numel)).tolist()
        assert selected == [position - low for position in positions if low <= position < low + 5]
        assert unit.meets(low, low + 5) or not selected


def test_runs_that_touch_are_one() -> None:
    """Down projections lie one behind another: those of neighbouring experts are one run."""
    units = tuple(Unit(f"d[{e}]", "expert.down", 0, e, 4 * e, 4) for e in range(6))
    assert expert_runs(Parameter("d", (6, 4), 0, "expert", units), "expert.down", {1, 2, 5}) == ((4, 12), (20, 24))
    assert len(expert_runs(fused(6, 4), "expert.gate", {1, 2, 5})) == 3


def indexed(unit: Unit, low: int, high: int) -> Tensor:
    """The definition by an index tensor: positions of a unit in the flat range [low, high), relative to ``low``."""
    first, last = max(low, unit.start), max(low, min(high, unit.end))
    positions = torch.arange(first, max(first, last), dtype=torch.int64)
    if unit.count > 1:
        positions = positions[(positions - unit.start) % unit.stride < unit.length]
    return positions - low


PACKED = {  # gpt-oss, Llama 4 (expert 1 of 4, [64, 2 · 12]), GPT-2's c_attn, one matrix of several stacked ones
    "alternating columns": Unit("a", "expert.up", 0, 1, 64 * 24 + 1, 1, 64 * 12, 2),
    "half of the columns": Unit("h", "expert.up", 0, 1, 64 * 24 + 12, 12, 64, 24),
    "alternating rows": Unit("r", "expert.up", 0, 1, 64 * 24 + 24, 24, 32, 48),
    "one run": Unit("o", "expert.up", 0, 1, 64 * 24, 64 * 24),
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_views_are_what_an_index_selects(name: str, ranks: int) -> None:
    """Reading, scaling, filling and writing, on shards whose ends cut a run."""
    unit, generator = PACKED[name], torch.Generator().manual_seed(1)
    parameter = Parameter("p", (4, 64, 24), 0, "expert", (unit,))
    for rank in range(ranks):
        low, high = shard_bounds(parameter.numel, rank, ranks)
        shard, index = whole(parameter).cut(low, high), indexed(unit, low, high)
        values = torch.randn(shard.numel, generator=generator)
        elements = shard.elements(unit, values)
        assert torch.equal(elements, values[index])
        assert torch.equal(elements.sum(), values[index].sum())
        assert torch.equal(moments(elements), moments(values[index]))
        scaled = values.clone()
        scaled[index] *= 0.3
        for view in shard.views(unit, values):
            view.mul_(0.3)
        assert torch.equal(values.view(torch.int32), scaled.view(torch.int32))
        written = torch.randn(len(index), generator=generator)
        scaled[index] = written
        assign(shard.views(unit, values), written)
        assert torch.equal(values, scaled)


def test_no_index_is_built() -> None:
    """On the meta device an index of positions could not be used: every step works on views of the tensor alone."""
    unit = PACKED["alternating columns"]
    parameter = Parameter("p", (4, 64, 24), 0, "expert", (unit,))
    shard, values = whole(parameter), torch.zeros(parameter.numel, device="meta")
    assert shard.elements(unit, values).shape == (unit.numel,)
    score_shard("esi", shard, values, values, {unit: 2.0})
    assign(shard.views(unit, values), torch.zeros(unit.numel, device="meta"))
    assert score_shard("random", shard, None, values, {}).device.type == "meta"

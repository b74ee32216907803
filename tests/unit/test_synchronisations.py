"""How often a GPU would be waited for: once a step or a table, whatever the number of tensors. Numbers stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from esi_ds.core.units import Parameter, Shard, Unit
from esi_ds.zero.sparse import ScatteredGradients, SparseTuner
from esi_ds.zero.statistics import log_histograms, unit_rows
from esi_ds.zero.tuner import Rule, Tuner

SCALAR = torch.ops.aten._local_scalar_dense.default  # of item(), int(), float(), bool() and comparisons in Python


class Reads(TorchDispatchMode):
    """Counts the numbers that Python reads out of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is SCALAR
        return func(*args, **(kwargs or {}))


@contextmanager
def at_most(number: int) -> Iterator[None]:
    with Reads() as reads:
        yield
    assert reads.count <= number, reads.count


class Plain(Tuner):
    """What the two tuners share."""

    forward = backward = step = saved = restored = None  # type: ignore[assignment]


Plain.__abstractmethods__ = frozenset()


def model_of(sizes: list[int], dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any, dict[str, Tensor]]:
    """A model of matrices, whole on this rank, with every third weight trained; the middle one trains none."""
    weights, shards = {}, []
    generator = torch.Generator().manual_seed(7)
    for number, size in enumerate(sizes):
        unit = Unit(f"m{number}", "expert.up", 0, number, 0, size)
        parameter = Parameter(f"m{number}", (size,), sum(sizes[:number]), "expert.up", (unit,))
        shards.append(Shard(parameter, ((0, size),), parameter.name))
        weights[parameter.name] = torch.randn(size, generator=generator).to(dtype)
    bits = {name: torch.arange(len(weight)) % 3 == 0 for name, weight in weights.items()}
    bits[f"m{len(sizes) // 2}"][:] = False
    model = SimpleNamespace(
        shards=tuple(shards),
        scored=tuple(shards),
        layouts=tuple(shards),
        parameters=tuple(shard.parameter for shard in shards),
        by_name={name: torch.nn.Parameter(weight.clone()) for name, weight in weights.items()},
        local_weight=lambda shard: weights[shard.name],
        expert_blocks={},
        has_one_group=True,
        publish=lambda: None,
    )
    trained = SimpleNamespace(
        count=lambda name: len(bits[name]),  # the mask's counts; the middle one is in it without a bit
        bits_of=lambda shard: bits[shard.name],
        positions_of=lambda shard: bits[shard.name].nonzero().flatten().int(),
    )
    return model, trained, weights


@pytest.mark.parametrize("count", [3, 30])
def test_share_moved_is_read_once(count: int) -> None:
    model, trained, weights = model_of([12] * count)
    tuner = Plain(model, trained)
    with at_most(2):
        assert tuner.share_moved() == 0.0
    weights["m0"][0] += 1
    weights["m0"][1] += 1  # frozen: not watched
    weights[f"m{count - 1}"][[0, 3]] += 1
    with at_most(2):
        moved = tuner.share_moved()
    assert moved == 3 / (4 * (count - 1))


def test_nothing_is_watched_where_nothing_trains() -> None:
    model, trained, _ = model_of([12])
    assert Plain(model, trained).share_moved() != Plain(model, trained).share_moved()  # NaN


@pytest.mark.parametrize("count", [3, 30])
def test_masters_are_written_back_in_one_piece(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, trained, weights = model_of([12] * count)
    tuner = SparseTuner(model, trained, Rule(), "scatter")
    assert isinstance(tuner.gradients, ScatteredGradients)
    tuner.state["master"] += 1.2345
    expected = {name: weight.clone() for name, weight in weights.items()}
    for shard in model.shards:
        bits = trained.bits_of(shard)
        expected[shard.name][bits] = (expected[shard.name][bits].float() + 1.2345).bfloat16()
    roundings = 0
    plain_to: Callable[..., Tensor] = Tensor.to

    def counted(self: Tensor, *arguments: Any, **options: Any) -> Tensor:
        nonlocal roundings
        result = plain_to(self, *arguments, **options)
        roundings += result.dtype == torch.bfloat16 and self.dtype == torch.float32
        return result

    monkeypatch.setattr(Tensor, "to", counted)
    with at_most(0):
        tuner._write_back()
    assert roundings == 1
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


@pytest.mark.parametrize("count", [3, 30])
def test_rows_and_ranges_of_the_report(count: int) -> None:
    model, trained, _ = model_of([12] * count)
    generator = torch.Generator().manual_seed(1)
    scores = {shard.name: torch.rand(12, generator=generator) for shard in model.scored}
    scores["m0"].zero_()
    selection = SimpleNamespace(bits={shard.name: trained.bits_of(shard) for shard in model.scored})
    rows = unit_rows(model, scores, selection, {})
    with at_most(8):
        _, by_role = log_histograms(model, scores)
    for number, row in enumerate(rows):
        values = scores[f"m{number}"]
        assert row["selected"] == int(selection.bits[f"m{number}"].sum())
        assert (row["max_score"], row["mean_score"]) == (float(values.max()), float(values.double().sum()) / 12)
    assert sum(by_role["expert.up"]) == 12 * (count - 1)

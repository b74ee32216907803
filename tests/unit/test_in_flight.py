"""Reductions in flight: started and received in one order, two at most, all by the flush, none after an error."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esi_ds.core.footprint import IN_FLIGHT
from esi_ds.core.units import Parameter, Shard, Unit
from esi_ds.zero import gradients as zero_gradients
from esi_ds.zero.gradients import GradientShards, SquaredGradientShards
from esi_ds.zero.in_flight import InFlight, Reduction

RANKS = 2


class FakeWork:
    """A collective whose result is there once it is waited for, and not before."""

    def __init__(self, number: int, events: list[str], finish: Any = None, fails: bool = False):
        self.number, self.events, self.finish, self.fails = number, events, finish, fails

    def wait(self) -> None:
        self.events.append(f"wait {self.number}")
        if self.fails:
            raise RuntimeError("connection closed by peer")
        if self.finish is not None:
            self.finish()


def reduction(number: int, events: list[str], size: int = 10, fails: bool = False) -> Reduction:
    work = FakeWork(number, events, fails=fails)
    received = partial(lambda number, local: events.append(f"receive {number}"), number)
    return Reduction(work, torch.zeros(2 * size), torch.zeros(size), received)


def start(queue: InFlight, number: int, events: list[str], size: int = 10, fails: bool = False) -> None:
    started = reduction(number, events, size, fails)
    queue.make_room(started.nbytes)
    events.append(f"start {number}")
    queue.add(started)


def test_two_are_in_flight_and_the_oldest_is_received_first() -> None:
    queue, events = InFlight(), []
    for number in range(4):
        start(queue, number, events)
        assert len(queue) == min(number + 1, IN_FLIGHT)
    queue.receive_all()
    received = [f"{what} {number}" for number in range(4) for what in ("wait", "receive")]
    starts = [f"start {number}" for number in range(4)]
    assert events == [*starts[:2], *received[:2], starts[2], *received[2:4], starts[3], *received[4:]]
    assert len(queue) == 0
    queue.receive_all()  # nothing twice
    assert len(events) == 12


def test_bytes_are_bounded_and_what_is_larger_is_received_at_once() -> None:
    size = 30 * 4  # bytes of send and local of ten elements
    queue, events = InFlight(most_bytes=2 * size - 1), []
    start(queue, 0, events)
    start(queue, 1, events)
    assert events == ["start 0", "wait 0", "receive 0", "start 1"] and len(queue) == 1
    start(queue, 2, events, size=20)
    assert events[4:] == ["wait 1", "receive 1", "start 2", "wait 2", "receive 2"] and len(queue) == 0


def test_without_room_for_any_each_is_received_at_once() -> None:
    queue, events = InFlight(most=0), []
    start(queue, 0, events)
    start(queue, 1, events)
    assert events == ["start 0", "wait 0", "receive 0", "start 1", "wait 1", "receive 1"]


def test_an_error_is_raised_where_it_is_waited_for_and_what_is_left_can_be_dropped() -> None:
    queue, events = InFlight(), []
    start(queue, 0, events, fails=True)
    start(queue, 1, events)
    with pytest.raises(RuntimeError, match="connection closed"):
        start(queue, 2, events)
    assert events == ["start 0", "start 1", "wait 0"] and len(queue) == 1
    queue.forget()
    queue.receive_all()
    assert events[-1] == "wait 0"


class FakeGroup:
    """Two ranks with the same gradients, of which this is the second: ``reduce_scatter_tensor`` and its handles."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.events: list[str] = []
        self.most = 0
        self._started = self._waited = 0
        self._fails_at: int | None = None
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: RANKS)
        monkeypatch.setattr(torch.distributed, "reduce_scatter_tensor", self._reduce_scatter)

    def fail_at(self, number: int) -> None:
        self._fails_at = number

    def _reduce_scatter(self, local: Tensor, send: Tensor, group: object, async_op: bool) -> FakeWork:
        assert async_op and send.dtype == local.dtype == torch.float32
        number, self._started = self._started, self._started + 1
        self.most = max(self.most, self._started - self._waited)
        if number == self._fails_at:
            raise RuntimeError("out of memory")
        local.fill_(torch.nan)

        def finish() -> None:
            self._waited += 1
            local.copy_(RANKS * send.view(RANKS, -1)[1])

        return FakeWork(number, self.events, finish)


def sharded(sizes: list[int]) -> tuple[Any, nn.ParameterList]:
    """What ``ReducedGradients`` asks of a model: matrices of one row, of which the second rank holds the rest."""
    tensors = nn.ParameterList(nn.Parameter(torch.full((size,), float(row + 1))) for row, size in enumerate(sizes))
    shards = []
    for row, size in enumerate(sizes):
        unit = Unit(f"m{row}", "other", None, None, 0, size)
        parameter = Parameter(f"m{row}", (size,), sum(sizes[:row]), "other", (unit,))
        shards.append(Shard(parameter, ((-(-size // RANKS), size),), parameter.name))
    model = SimpleNamespace(
        scored=tuple(shards),
        by_name={shard.name: tensor for shard, tensor in zip(shards, tensors, strict=True)},
        expert_blocks={},
        has_one_group=True,
        group=lambda shard: None,
        partition_numel=lambda shard: -(-shard.parameter.numel // RANKS),
    )
    return model, tensors


def backward(tensors: nn.ParameterList, factor: float = 1.0) -> None:
    """The gradient of tensor r at i is factor · (r + 1) · i."""
    parts = [(tensor.square() / 2 * torch.arange(len(tensor))).sum() for tensor in tensors]
    (factor * torch.stack(parts).sum()).backward()


@pytest.mark.parametrize("bucket", [1, 13, 1000])
def test_sums_are_those_of_reductions_that_are_waited_for_at_once(bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_gradients, "BUCKET_NUMEL", bucket)
    group, sizes = FakeGroup(monkeypatch), [7, 6, 5, 12, 1, 9]
    model, tensors = sharded(sizes)
    sums = GradientShards(model, torch.device("cpu"))
    with sums.collecting():
        for factor in (1.0, 3.0):
            backward(tensors, factor)
            sums.flush()
            assert len(sums._in_flight) == 0
    expected = {}
    for row, size in enumerate(sizes):
        expected[f"m{row}"] = RANKS * 4 * (row + 1) * torch.arange(-(-size // RANKS), size).float()
    assert all(torch.equal(sums.sums[name], values) for name, values in expected.items())
    squares = sum(float((values / 4).square().sum()) for values in expected.values())
    assert sums.take_norm_squared() == pytest.approx(10 * squares)  # of both passes: 1² + 3²
    assert group.events == [f"wait {number}" for number in range(len(group.events))]
    assert group.most == min(IN_FLIGHT, len(group.events) // 2)


def test_sums_of_a_bf16_model_are_not_rounded_to_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 a sum that has reached 2 would stay there: 2 / 256 is half of its last place."""
    FakeGroup(monkeypatch)
    model, tensors = sharded([6])
    tensors.bfloat16()
    sums, passes = GradientShards(model, torch.device("cpu")), 300
    with sums.collecting():
        for _ in range(passes):
            (tensors[0] / 256).sum().backward()
            sums.flush()
    assert torch.equal(sums.sums["m0"], torch.full((3,), passes * RANKS / 256))


def test_the_norm_of_squared_gradients_is_that_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank squares its own; their sum is the squared norm of all that were added."""
    FakeGroup(monkeypatch)
    model, tensors = sharded([7, 6])
    squares = SquaredGradientShards(model, torch.device("cpu"))
    with squares.collecting():
        backward(tensors)
        squares.flush()
    added = [RANKS * ((row + 1) * torch.arange(-(-size // RANKS), size)).square() for row, size in enumerate([7, 6])]
    assert torch.equal(squares.sums["m0"], added[0].float()) and torch.equal(squares.sums["m1"], added[1].float())
    assert squares.take_norm_squared() == sum(int(values.sum()) for values in added)


def test_an_error_in_a_hook_leaves_nothing_for_the_next_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_gradients, "BUCKET_NUMEL", 9)
    group = FakeGroup(monkeypatch)
    model, tensors = sharded([12, 4, 12, 4, 12, 4])
    sums = GradientShards(model, torch.device("cpu"))
    group.fail_at(2)
    with pytest.raises(RuntimeError, match="out of memory"), sums.collecting():
        backward(tensors)
    for values in sums.sums.values():
        values.zero_()
    with sums.collecting():
        backward(tensors)
        sums.flush()
    assert torch.equal(sums.sums["m0"], RANKS * torch.arange(6, 12).float())
    assert torch.equal(sums.sums["m1"], RANKS * 2 * torch.arange(2, 4).float())


def test_gradients_that_are_not_flushed_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGroup(monkeypatch)
    model, tensors = sharded([3, 4])
    sums = GradientShards(model, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="not flushed"), sums.collecting():
        backward(tensors)

"""How often a GPU would be waited for: once a step or a table, whatever the number of tensors. Numbers stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from esi_ds.core.moments import moments, standard_deviation
from esi_ds.core.select import all_valid
from esi_ds.core.units import Parameter, Shard, Unit
from esi_ds.errors import UserError
from esi_ds.zero import runtime
from esi_ds.zero.dense import DenseTuner
from esi_ds.zero.engine import check_leaves
from esi_ds.zero.score import check_scores, contrast_scores, unit_sigmas
from esi_ds.zero.sparse import ScatteredGradients, SparseTuner
from esi_ds.zero.statistics import NUM_BINS, log_histograms, unit_rows
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
def at_most(number: int, copies: int | None = None) -> Iterator[None]:
    """copies: how often tensors may be copied to the CPU at most; None: not counted."""
    calls, plain = 0, Tensor.cpu

    def counted(self: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return plain(self)

    with Reads() as reads, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "cpu", counted)
        yield
    assert reads.count <= number, reads.count
    assert copies is None or calls <= copies, calls


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


def test_tensors_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for each of them: listed experts are tens of thousands of tensors."""
    model, trained, _ = model_of([12] * 100)
    calls, numel = [0], Shard.numel.fget  # type: ignore[attr-defined]

    def counted(shard: Shard) -> int:
        calls[0] += 1
        return int(numel(shard))

    monkeypatch.setattr(Shard, "numel", property(counted))
    Plain(model, trained)
    assert calls[0] <= 3 * 100


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
    with at_most(8, copies=2):
        overall, by_role = log_histograms(model, scores)
    for number, row in enumerate(rows):
        values = scores[f"m{number}"]
        assert row["selected"] == int(selection.bits[f"m{number}"].sum())
        assert (row["max_score"], row["mean_score"]) == (float(values.max()), float(values.double().sum()) / 12)
    positive = torch.cat(list(scores.values())[1:]).double().log10().numpy()
    counts, edges = np.histogram(positive, bins=NUM_BINS)
    assert overall["counts"] == by_role["expert.up"] == counts.tolist() and overall["zeros"] == 12
    assert overall["log10_edges"] == pytest.approx(edges.tolist())


@pytest.mark.parametrize("count", [3, 30])
def test_deviations_checks_and_contrasts_are_read_once(count: int) -> None:
    """Once a run each, over all tensors together; the numbers are those of one tensor after the other."""
    model, _, weights = model_of([12] * count)
    with at_most(0, copies=1):
        sigma = unit_sigmas(model)
    for name, weight in weights.items():
        (deviation,) = (value for unit, value in sigma.items() if unit.name == name)
        assert deviation == float(standard_deviation(moments(weight)))
        assert deviation == pytest.approx(float(weight.double().std()), rel=1e-12)
    generator = torch.Generator().manual_seed(2)
    scores = {shard.name: torch.rand(12, generator=generator) for shard in model.scored}
    scores["m1"] = torch.zeros(0)
    with at_most(1):
        check_scores(model, scores, "select.criterion")
    with at_most(1):
        assert all_valid(scores.values()) and all_valid([])
    expected = {name: values / 2 for name, values in scores.items()}
    denominators = {name: torch.full_like(values, 2.0) for name, values in scores.items()}
    denominators["m0"][3:5], expected["m0"][3:5] = 0.0, 0.0
    scores["m0"][4] = 0.0
    with at_most(2):  # the sum here, and that over the ranks
        assert contrast_scores(scores, denominators) == 1
    assert all(torch.equal(scores[name], expected[name]) for name in scores)


def test_what_another_rank_alone_has_met_is_an_error_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that went on would wait for the others in the next collective."""
    model, _, _ = model_of([12] * 3)
    scores = {shard.name: torch.ones(12) for shard in model.scored}
    other = UserError("select.criterion", None, "the score of m9, flat index 4, is inf", "look at the data")
    monkeypatch.setattr(runtime, "gather_objects", lambda own: [own, other])
    with pytest.raises(UserError, match=r"select\.criterion: the score of m9, flat index 4, is inf"):
        check_scores(model, scores, "select.criterion")
    monkeypatch.setattr(runtime, "all_reduce_sum", lambda counts: counts + 5)
    assert contrast_scores(scores, scores) == 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, -0.0])
def test_what_cannot_be_ranked_is_noticed_in_any_tensor(bad: float) -> None:
    tensors = [torch.rand(5), torch.zeros(0), torch.tensor([1.0, bad, 2.0])]
    assert all_valid(tensors[:2]) and not all_valid(tensors) and not all_valid(tensors[::-1])


class Layered(nn.Module):
    """Embeddings of tokens, of positions, and a layer, within a trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleDict(
            {"tokens": nn.Linear(3, 3), "positions": nn.Embedding(4, 3), "layer": nn.Linear(3, 3)}
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.trunk["tokens"]


@pytest.mark.parametrize("leaf", ["", "trunk", "trunk.tokens", "trunk.positions", "trunk.layer"])
def test_no_leaf_of_zero_looks_up_embeddings(leaf: str) -> None:
    """Its hook, of a module that is given integers, would run before its gradients exist."""
    model: Any = Layered()
    check_leaves(model)
    set_z3_leaf_module(model.get_submodule(leaf), True)
    if leaf == "trunk.layer":
        check_leaves(model)
        return
    named = "leaf_module or stage3_module_granularity_threshold"
    with pytest.raises(UserError, match=f"{named} make a leaf of {leaf or 'the whole model'} .*lower the threshold"):
        check_leaves(model)


def test_only_routed_experts_may_get_no_gradient_with_an_engine() -> None:
    expert = Parameter("up", (2,), 0, "expert", (Unit("up[0]", "expert.up", 0, 0, 0, 2),))
    matrix = Parameter("down", (2,), 2, "mlp.down", (Unit("down", "mlp.down", 0, None, 0, 2),))
    for counts, may in (({"up": 1, "down": 0}, True), ({"up": 1, "down": 1}, False)):
        model, trained = SimpleNamespace(parameters=(expert, matrix)), SimpleNamespace(count=counts.get)
        tuner = SimpleNamespace(model=model, trained=trained)
        assert DenseTuner.may_get_no_gradient.fget(tuner) is may  # type: ignore[attr-defined]

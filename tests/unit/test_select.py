"""Selection against sorting the whole vector (docs/method.md §2): exact, in runs, with ties, zeros and denormals."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from esi_ds.core.noise import random_bits, stream
from esi_ds.core.select import (
    LARGEST_KEY,
    Cut,
    Order,
    ScoreRun,
    check_ratio,
    key_to_score,
    radix_search,
    select,
    share_sizes,
)
from esi_ds.core.units import Parameter, Shard, Unit
from esi_ds.errors import UserError
from esi_ds.stages.perturb.work import PerturbRun
from esi_ds.zero.statistics import NUM_BINS, _counts


def identity(counts: torch.Tensor) -> torch.Tensor:
    return counts


def sorted_mask(scores: torch.Tensor, k: int, order: str) -> torch.Tensor:
    """The definition: sort everything, ties by position."""
    ranking = torch.sort(scores, descending=order == "top", stable=True).indices
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[ranking[:k]] = True
    return mask


def random_scores(case: int) -> torch.Tensor:
    """Vectors with what breaks selections: many ties, zeros, denormals, huge values, a single value."""
    generator = torch.Generator().manual_seed(case)
    size = int(torch.randint(1, 4000, (), generator=generator))
    scores = torch.rand(size, generator=generator)
    kind = case % 8
    if kind == 1:
        scores = (scores * 5).floor()
    elif kind == 2:
        scores[torch.rand(size, generator=generator) < 0.9] = 0.0
    elif kind == 3:
        scores = scores * 1e-42  # denormal
    elif kind == 4:
        scores = scores * torch.tensor([1e-38, 1.0, 3e38])[torch.randint(0, 3, (size,), generator=generator)]
    elif kind == 5:
        scores = torch.full((size,), 0.25)
    elif kind == 6:
        scores = torch.zeros(size)
    elif kind == 7:
        scores = (scores * 300).floor() * 2.0**-149
    return scores


def runs_of(scores: torch.Tensor, num_cuts: int, case: int) -> list[ScoreRun]:
    """The vector in contiguous runs of random, possibly zero, length."""
    generator = torch.Generator().manual_seed(case)
    cuts = torch.randint(0, len(scores) + 1, (num_cuts,), generator=generator).sort().values.tolist()
    return [ScoreRun(scores[a:b], a) for a, b in itertools.pairwise([0, *cuts, len(scores)])]


@pytest.mark.parametrize("order", ["top", "bottom"])
@pytest.mark.parametrize("case", range(120))
def test_equals_sorting_the_whole_vector(case: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esi_ds.core.select.CHUNK", 150 + case)  # a run is read in many chunks
    scores = random_scores(case)
    size = len(scores)
    for k in {0, 1, size // 100, size // 3, size - 1, size}:
        runs = runs_of(scores, case % 5, case)
        (cut,) = select([runs], [k], Order(order), size - 1, identity)
        got = torch.cat([cut.selects(Order(order).keys(p.scores, p.position), p.position) for p in runs])
        assert torch.equal(got, sorted_mask(scores, k, order)), (case, order, k)


def test_random_order_is_a_k_subset_that_does_not_depend_on_the_cuts() -> None:
    scores, masks = torch.rand(5000), []
    for num_cuts in (0, 1, 7):
        runs = runs_of(scores, num_cuts, 3)
        (cut,) = select([runs], [500], Order("random", seed=4), 4999, identity)
        order = Order("random", seed=4)
        masks.append(torch.cat([cut.selects(order.keys(p.scores, p.position), p.position) for p in runs]))
    assert masks[0].sum() == 500
    assert all(torch.equal(masks[0], mask) for mask in masks[1:])
    (other,) = select([[ScoreRun(scores, 0)]], [500], Order("random", seed=5), 4999, identity)
    other_mask = other.selects(Order("random", seed=5).keys(scores, 0), 0)
    overlap = int((other_mask & masks[0]).sum())
    assert 20 < overlap < 90  # two independent 10 % subsets of 5,000: 50 ± 6.4


def one_matrix(numel: int) -> tuple[SimpleNamespace, torch.Tensor]:
    """A model of one scored matrix, whole on this rank, and scores."""
    matrix = Parameter("w", (numel,), 0, "mlp.up", (Unit("w", "mlp.up", 0, None, 0, numel),))
    shards = (Shard(matrix, ((0, numel // 3), (numel // 3, numel)), "w"),)
    return SimpleNamespace(parameters=(matrix,), scored=shards, shards_of=lambda _: shards), torch.rand(numel)


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Chunks of 50 elements; the elements that each of the larger steps of a selection took at once."""
    monkeypatch.setattr("esi_ds.core.select.CHUNK", 50)
    monkeypatch.setattr("esi_ds.zero.statistics.CHUNK", 50)
    sizes: list[int] = []
    plain_to, plain_double = torch.Tensor.to, torch.Tensor.double

    def hashes(key: int, positions: torch.Tensor, bits: int) -> torch.Tensor:
        sizes.append(len(positions))
        return random_bits(key, positions, bits)

    def to(values: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        sizes.append(values.numel())
        return plain_to(values, *arguments, **options)

    def double(values: torch.Tensor) -> torch.Tensor:
        sizes.append(values.numel())
        return plain_double(values)

    monkeypatch.setattr("esi_ds.core.select.random_bits", hashes)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "double", double)
    return sizes


@pytest.mark.parametrize("scope", ["model", "matrix"])
@pytest.mark.parametrize("order", ["top", "random", "bottom"])
def test_a_gpu_holds_a_chunk_of_what_is_selected_from(order: str, scope: str, largest: list[int]) -> None:
    """The model may fill it: a perturbation's scores stay on the CPU, and hashes are made of a few positions."""
    model, scores = one_matrix(1234)
    header = SimpleNamespace(of="all", scope=scope, k_of=lambda ratio: int(ratio * 1234))
    run: Any = SimpleNamespace(inputs=SimpleNamespace(mask=SimpleNamespace(header=header)))
    bits = PerturbRun._select(run, model, order, 0.3, 5, {"w": scores})["w"]
    assert largest and max(largest) <= 50
    if order == "random":
        scores, order = random_bits(stream(5, 0x5E1EC7), torch.arange(1234), 31), "top"
    assert torch.equal(bits, sorted_mask(scores, 370, order))


def test_keys_are_made_on_the_order_s_device() -> None:
    for name in ("top", "random", "bottom"):
        order = Order(name, device=torch.device("meta"))
        assert order.keys(torch.rand(3), 0).device.type == "meta"


def test_histograms_take_a_chunk_at_a_time(largest: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.cat([torch.zeros(7), 10.0 ** torch.randint(-6, 0, (300,), generator=generator)])
    counts = _counts(scores, -6.5, 0.0)
    assert max(largest) <= 50
    bins, _ = np.histogram(scores[7:].double().log10().numpy(), bins=NUM_BINS, range=(-6.5, 0.0))
    assert counts.tolist() == [*bins.tolist(), 7]
    assert _counts(scores[:0], -6.5, 0.0).tolist() == [0] * (NUM_BINS + 1)


def test_groups_are_selected_each_by_itself() -> None:
    scores = random_scores(1)
    half = len(scores) // 2
    groups = [[ScoreRun(scores[:half], 0)], [ScoreRun(scores[half:], half)], []]
    cuts = select(groups, [5, 7, 0], Order("top"), len(scores) - 1, identity)
    got = [
        cut.selects(piece.scores.view(torch.int32), piece.position)
        for cut, (piece,) in zip(cuts, groups[:2], strict=False)
    ]
    assert torch.equal(got[0], sorted_mask(scores[:half], 5, "top"))
    assert torch.equal(got[1], sorted_mask(scores[half:], 7, "top"))


def test_positions_beyond_two_to_the_31_by_index_arithmetic() -> None:
    """Ties of a vector of 10^12 elements of which only a few exist here: positions are int64 throughout."""
    base = 10**12
    scores = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.5])
    runs = [ScoreRun(scores, base), ScoreRun(scores, 3 * 2**31), ScoreRun(scores, 7)]
    (cut,) = select([runs], [5], Order("top"), base + 10, identity)
    got = [cut.selects(p.scores.view(torch.int32), p.position).tolist() for p in runs]
    assert got[2] == [False, True, True, True, False]  # the lowest positions first
    assert got[1] == [False, True, True, False, False]
    assert got[0] == [False] * 5
    assert cut.position == 3 * 2**31 + 2


def test_traffic_is_histograms_only() -> None:
    """At most 64 KiB a pass, however long the vector."""
    sizes: list[int] = []

    def watch(counts: torch.Tensor) -> torch.Tensor:
        sizes.append(counts.numel() * counts.element_size())
        return counts

    for size in (10, 200_000):
        sizes.clear()
        select([[ScoreRun(torch.rand(size), 0)]], [5], Order("top"), 2**40, watch)
        assert max(sizes) <= 64 * 1024
        assert len(sizes) == 7  # 3 passes over scores, 4 over 41-bit positions


def test_radix_search_counts_larger_keys() -> None:
    keys = torch.tensor([5, 9, 9, 1, 9, 3])
    value, larger = radix_search([lambda: [keys]], torch.tensor([4]), 31, identity)
    assert (int(value), int(larger)) == (5, 3)


def test_threshold_is_the_smallest_selected_score() -> None:
    scores = torch.tensor([0.1, 0.7, 0.3, 0.9])
    (cut,) = select([[ScoreRun(scores, 0)]], [2], Order("top"), 3, identity)
    assert key_to_score(cut, "top") == scores[1].item()
    (cut,) = select([[ScoreRun(scores, 0)]], [2], Order("bottom"), 3, identity)
    assert key_to_score(cut, "bottom") == scores[2].item()
    assert key_to_score(Cut(LARGEST_KEY, -1, 0), "top") is None


def test_random_bits_are_uniform() -> None:
    draws = random_bits(7, torch.arange(100_000), 31).double() / 2**31
    assert abs(draws.mean() - 0.5) < 5 * (1 / 12) ** 0.5 / 100_000**0.5  # five standard errors
    assert torch.bincount((draws * 10).long(), minlength=10).min() > 9_500  # 10,000 ± 95


@pytest.mark.parametrize("size", [1, 3, 49, 1000, 10**7 + 19])
def test_the_least_ratio_is_named(size: int) -> None:
    """1 / 49 · 49 is less than 1 in floating point: what is named must not be refused."""
    if size > 1:
        with pytest.raises(UserError, match=r"select\.ratio = .*selects nothing") as raised:
            check_ratio(0.99 / size, [1, size], "select.ratio")
        least = float(raised.value.remedy.split()[-1])
        check_ratio(least, [1, size], "select.ratio")
        assert int(least * size) == 1
    check_ratio(1.0, [size], "select.ratio")
    check_ratio(1e-9, [], "select.ratio")


def test_what_a_ratio_is_a_share_of() -> None:
    units = (Unit("w.a", "mlp.up", 0, None, 0, 8), Unit("w.b", "mlp.up", 0, None, 8, 4))
    parameters = (Parameter("w", (3, 4), 0, "mlp.up", units), Parameter("b", (5,), 12, "bias", ()))
    assert share_sizes(parameters, "all", "model") == [17]
    assert share_sizes(parameters, "scored", "model") == [12]
    assert share_sizes(parameters, "all", "matrix") == share_sizes(parameters, "scored", "matrix") == [8, 4]

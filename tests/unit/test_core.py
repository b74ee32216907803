"""Units, moments, noise, surrogates and bits: each against its definition."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from esi_ds.core.mask import num_bytes, pack_bits, unpack_bits
from esi_ds.core.moments import merge, moments, standard_deviation
from esi_ds.core.noise import gumbel, normal, random_bits, stream
from esi_ds.core.portable import cos, log
from esi_ds.core.surrogate import (
    UNSAMPLED_LOGIT,
    advantages,
    estimate,
    paper_code_surrogate,
    score_function_surrogate,
    softmax_surrogate,
)
from esi_ds.core.units import Unit
from esi_ds.zero.files import Entry, file_header


@pytest.mark.parametrize(
    "unit",
    [
        Unit("a", "x", None, None, 3, 10),
        Unit("b", "x", None, None, 1, 1, 9, 2),
        Unit("c", "x", None, None, 4, 3, 4, 5),
    ],
)
def test_unit_within_any_slice(unit: Unit) -> None:
    inside = {unit.start + i * unit.stride + j for i in range(unit.count) for j in range(unit.length)}
    values = torch.arange(30)
    for low in range(0, 30):
        for high in range(low, 31):
            got = unit.elements(values[low:high], low).tolist()
            assert got == sorted(inside & set(range(low, high)))


@pytest.mark.parametrize("sizes", [(5,), (0, 7), (3, 0, 1, 900), (1,)])
def test_standard_deviation_of_pieces(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Far from zero, where E[x²] − E[x]² would lose every digit; a piece is converted in many chunks."""
    monkeypatch.setattr("esi_ds.core.moments.CHUNK", 7)
    values = (torch.randn(sum(sizes), generator=torch.Generator().manual_seed(1)) + 1e4).float()
    local = torch.stack([moments(piece) for piece in values.split(sizes)])
    got = standard_deviation(merge(local, lambda rows: rows.sum(0)))
    expected = values.double().std().item() if len(values) > 1 else 0.0
    # float64 sums in another order: 1e-12 leaves three digits of margin over 900 roundings.
    assert float(got) == pytest.approx(expected, rel=1e-12)


def test_gumbel_is_keyed_by_row_and_standard() -> None:
    whole = gumbel(stream(0, 5, 0), torch.arange(40), 1000)
    part = gumbel(stream(0, 5, 0), torch.arange(10, 20), 1000)
    assert torch.equal(whole[10:20], part)
    assert not torch.equal(whole, gumbel(stream(0, 6, 0), torch.arange(40), 1000))
    assert whole.isfinite().all()
    # Mean γ, variance π²/6; 40,000 draws: five standard errors.
    assert abs(whole.mean() - 0.577216) < 5 * math.pi / 6**0.5 / 200
    assert abs(whole.var() - math.pi**2 / 6) < 0.1
    # Rows must not be shifted copies of one another.
    assert abs(torch.corrcoef(whole[:2])[0, 1]) < 0.16  # five standard errors of 1/√1000


@pytest.mark.parametrize("noisy", [False, True])
def test_softmax_surrogate_gradient_is_autograds(noisy: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 50, dtype=torch.float64, requires_grad=True)
    contraction = torch.randn(6, 50, dtype=torch.float64)
    noise = torch.randn(6, 50, dtype=torch.float64) if noisy else None
    shifted = logits if noise is None else logits + noise
    expected = ((shifted / 0.3).softmax(-1) * contraction).sum()
    expected.backward()
    expected = expected.detach()
    value, gradient = softmax_surrogate(logits.detach(), contraction, 0.3, noise)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-12, atol=1e-14)  # float64, two orders of summing
    assert float(value.sum()) == pytest.approx(float(expected), rel=1e-12)


def test_score_function_gradient_is_autograds() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 30, requires_grad=True)
    sampled = torch.tensor([3, 0, 29, 3])
    value, gradient = score_function_surrogate(logits.detach(), sampled, -1.7)
    expected = -1.7 * torch.nn.functional.cross_entropy(logits, sampled, reduction="none").neg()
    (by_autograd,) = torch.autograd.grad(expected.sum(), logits)
    # The same formulas in fp32, another order of operations.
    torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, by_autograd, rtol=1e-5, atol=1e-6)


def test_the_baseline_is_the_mean_of_the_others() -> None:
    assert advantages({0: 1.0, 4: 3.0, 7: 8.0}) == {0: 1.0 - 5.5, 4: 3.0 - 4.5, 7: 8.0 - 2.0}
    assert advantages({3: 2.5}) == {3: 2.5} and advantages({}) == {}


def test_paper_code_surrogate_is_the_gradient_at_hard_logits() -> None:
    torch.manual_seed(0)
    sampled = torch.tensor([3, 49, 0])
    contraction = torch.randn(3, 50)
    hard = torch.full((3, 50), UNSAMPLED_LOGIT, dtype=torch.float64)
    hard.scatter_(1, sampled.unsqueeze(1), 0.0).requires_grad_()
    (hard.softmax(-1) * contraction.double()).sum().backward()
    logits = torch.randn(3, 50)
    value, gradient = paper_code_surrogate(logits, contraction, sampled)
    # Autograd itself cancels: q(1 − Σq) with Σq = 2e-6 keeps about 1e-10 of its float64 digits. fp32 result: 6e-8.
    torch.testing.assert_close(gradient.double(), hard.grad, rtol=1e-6, atol=1e-16)
    assert (gradient.abs().argmax(1) == sampled).all()
    assert float(value.sum()) == pytest.approx(float((gradient * logits).sum()), rel=1e-6)


def test_estimate_averages_gumbel_draws() -> None:
    torch.manual_seed(0)
    logits, contraction, sampled = torch.randn(4, 30), torch.randn(4, 30), torch.zeros(4, dtype=torch.int64)
    options = {"temperature": 0.3, "seed": 3, "prompt_index": 11}
    value, mean = estimate("gumbel", logits, contraction, sampled, samples=3, **options)
    draws = [
        softmax_surrogate(logits, contraction, 0.3, gumbel(stream(3, 11, d), torch.arange(4), 30)) for d in range(3)
    ]
    values, gradients = zip(*draws, strict=True)
    torch.testing.assert_close(value, torch.stack(values).sum(1).mean())
    torch.testing.assert_close(mean, torch.stack(gradients).mean(0))
    _, other = estimate("gumbel", logits, contraction, sampled, samples=3, **{**options, "prompt_index": 12})
    assert not torch.allclose(mean, other)


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 64, 129])
def test_bits_round_trip_least_significant_first(numel: int) -> None:
    bits = torch.rand(numel, generator=torch.Generator().manual_seed(numel)) < 0.5
    packed = pack_bits(bits)
    assert len(packed) == math.ceil(numel / 8)
    assert all(bool(int(packed[i // 8]) >> (i % 8) & 1) == bool(bits[i]) for i in range(numel))
    if numel % 8:
        assert int(packed[-1]) >> (numel % 8) == 0
    assert torch.equal(unpack_bits(packed, numel), bits)
    assert torch.equal(unpack_bits(packed, numel - 1, skip=1), bits[1:])


def test_random_bits_are_those_of_earlier_versions() -> None:
    """Or random masks that are on disk would not be those of their seeds."""
    assert (stream(0), stream(3, 11, 2)) == (-2152535657050944081, -4866828402568784097)
    drawn = random_bits(stream(3), torch.tensor([0, 1, 2**40]), 31)
    assert drawn.tolist() == [790680964, 2026288756, 44834545]


def test_normal_noise_is_a_function_of_its_position() -> None:
    positions = torch.arange(400_000)
    drawn = normal(stream(3), positions)
    assert drawn.dtype == torch.float32 and drawn.isfinite().all()
    # Sampling errors of 400,000 draws: 0.0016 of the mean, 0.0011 of σ, 0.0077 of the kurtosis; five of each.
    assert abs(drawn.mean()) < 0.008 and abs(drawn.std() - 1) < 0.006
    assert abs((drawn.double() ** 4).mean() - 3) < 0.04
    assert scipy.stats.kstest(drawn.numpy()[:20_000], "norm").pvalue > 1e-3
    chunks = torch.cat([normal(stream(3), part) for part in positions.split(1237)])
    assert torch.equal(chunks, drawn)
    other, next_to = normal(stream(4), positions), drawn.roll(1)
    for series in (other, next_to):
        assert abs(torch.corrcoef(torch.stack([drawn, series]))[0, 1]) < 0.008
    far = normal(stream(3), positions + (1 << 40))
    assert not torch.equal(far, drawn)


def test_normal_noise_has_the_bits_of_its_definition() -> None:
    """torch's own logarithm and cosine differ in a last bit of float64, which float32 does not show here."""
    positions = torch.arange(2**33, 2**33 + (1 << 20))
    first, second = (
        (random_bits(stream(stream(11), which), positions, 53).double() + 0.5) * 2.0**-53 for which in (1, 2)
    )
    expected = ((-2.0 * first.log()).sqrt() * (2.0 * math.pi * second).cos()).float()
    assert torch.equal(normal(stream(11), positions), expected)
    ends = torch.tensor([2.0**-54, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    torch.testing.assert_close(log(ends), ends.log(), rtol=3e-16, atol=0)
    angles = torch.linspace(0, 2 * math.pi, 9, dtype=torch.float64)  # between them the quadrants change
    torch.testing.assert_close(cos(angles), angles.cos(), rtol=3e-16, atol=1e-26)


def test_noise_uses_operations_only_that_all_devices_round_alike() -> None:
    """What a GPU computes is not seen here; that no function but an exactly rounded one is called is."""
    exact = {"add", "sub", "rsub", "mul", "div", "neg", "sqrt", "round", "where", "lt", "eq", "bitwise_or", "remainder"}
    moves = {"arange", "empty", "split", "copy_", "_to_copy", "to", "frexp"}
    integers = {"bitwise_and", "bitwise_xor", "__rshift__", "zeros", "_local_scalar_dense", "add_", "detach"}
    called: set[str] = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            name = function.overloadpacket.__name__
            called.add(name)
            if name == "div":
                assert all(isinstance(argument, torch.Tensor) for argument in arguments)
            return function(*arguments, **(options or {}))

    with Record():
        normal(7, torch.arange(100))
    assert called <= exact | moves | integers, called - exact - moves - integers


@pytest.mark.parametrize("first", [2**31 - 3, 2**33 + 5])
def test_positions_beyond_what_32_bits_hold(first: int) -> None:
    """A fused tensor of 128 experts of 4096 × 3072 × 2 has 3.2e9 elements; nothing of it is allocated here."""
    run = Unit("run", "x", None, None, first, 10)
    assert run.elements(torch.arange(6), first - 2).tolist() == [2, 3, 4, 5]
    alternate = Unit("alternate", "x", None, None, first, 1, 2**33, 2)
    assert alternate.elements(torch.arange(6), first + 1).tolist() == [1, 3, 5]
    rows = Unit("rows", "x", None, None, first, 3, 2**31, 5)
    selected = rows.elements(torch.arange(7), first + 5 * 2**20 + 2)
    assert selected.tolist() == [0, 3, 4, 5]
    assert num_bytes(3 * 2**32 + 1) == 3 * 2**29 + 1


def test_files_of_tensors_beyond_what_32_bits_hold() -> None:
    entries = [Entry("first", "F32", (128, 6144, 4096)), Entry("second", "F32", (2, 3))]
    _, starts = file_header(entries, {})
    assert starts["second"] - starts["first"] == 4 * 128 * 6144 * 4096 > 2**33

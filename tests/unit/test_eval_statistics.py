"""Intervals and tests against scipy, statsmodels and formulas written out, on random tables and at the edges."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict

import numpy as np
import pytest
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.proportion import proportion_confint

from esi_ds.eval import statistics
from esi_ds.eval.statistics import CONFIDENCE, cohen_kappa, mcnemar_exact, paired_bootstrap, paired_rates, wilson
from esi_ds.eval.verdicts import NOTHING_SAID, Verdict, is_empty

# Both sides are closed formulas in float64.
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def test_wilson_is_the_formula_and_statsmodels() -> None:
    generator = np.random.default_rng(0)
    sizes = [1, 2, 7, 80, 520, 100_000]
    tables = [(0, n) for n in sizes] + [(n, n) for n in sizes]
    tables += [(int(generator.integers(n + 1)), n) for n in sizes for _ in range(20)]
    z = stats.norm.ppf((1 + CONFIDENCE) / 2)
    for count, n in tables:
        interval = wilson(count, n)
        share = count / n
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        np.testing.assert_allclose((interval.low, interval.high), (centre - half, centre + half), **CLOSE)
        reference = proportion_confint(count, n, 1 - CONFIDENCE, method="wilson")
        np.testing.assert_allclose((interval.low, interval.high), reference, **CLOSE)
        assert 0 <= interval.low <= interval.rate <= interval.high <= 1


def test_wilson_at_the_edges() -> None:
    nothing = wilson(0, 0)
    assert (nothing.rate, nothing.low, nothing.high) == (None, 0.0, 1.0)
    for count, n in ((-1, 3), (4, 3)):
        with pytest.raises(ValueError, match="not a rate"):
            wilson(count, n)


def flags(generator: np.random.Generator, size: int) -> list[bool | None]:
    return [[True, False, None][draw] for draw in generator.choice(3, size, p=[0.4, 0.5, 0.1])]


def test_mcnemar_is_statsmodels_and_the_binomial_sum() -> None:
    generator = np.random.default_rng(1)
    for size in [1, 2, 5, 30, 300] * 8:
        before, after = flags(generator, size), flags(generator, size)
        test = mcnemar_exact(before, after)
        complete = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
        table = [[complete.count((b, a)) for a in (True, False)] for b in (True, False)]
        assert [[test.both, test.only_before], [test.only_after, test.neither]] == table
        assert (test.num_pairs, test.num_missing) == (len(complete), size - len(complete))
        changed = test.only_before + test.only_after
        np.testing.assert_allclose(test.p_value, mcnemar(table, exact=True).pvalue, **CLOSE)
        tail = sum(math.comb(changed, i) for i in range(min(test.only_before, test.only_after) + 1))
        np.testing.assert_allclose(test.p_value, min(1, 2 * tail / 2**changed), **CLOSE)
        if complete:
            rates = np.mean(complete, axis=0)
            np.testing.assert_allclose(test.difference, rates[1] - rates[0], **CLOSE)


@pytest.mark.parametrize(
    ("before", "after", "p_value", "num_pairs"),
    [
        ([], [], 1, 0),
        ([None, None], [True, None], 1, 0),
        ([True] * 9, [True] * 9, 1, 9),
        ([True] * 9, [False] * 9, 2 / 2**9, 9),
    ],
)
def test_mcnemar_at_the_edges(before: list, after: list, p_value: float, num_pairs: int) -> None:
    test = mcnemar_exact(before, after)
    assert (test.p_value, test.num_pairs) == (p_value, num_pairs)
    assert test.num_missing == len(before) - num_pairs and (test.difference is None) == (num_pairs == 0)


def test_numpy_flags_are_flags() -> None:
    assert mcnemar_exact(np.array([True, False]), np.array([False, False])).only_before == 1


def standard_errors(counts: tuple[int, int, int], hypothesis: float) -> float:
    """How many lie between the observed difference and another, where the shares are the likeliest under that one."""
    only_before, only_after, same = counts
    least, most = max(0.0, -hypothesis), (1 - hypothesis) / 2  # shares of only_before that leave none below 0

    def unlikelihood(share: float) -> float:
        shares = (share, share + hypothesis, max(1 - 2 * share - hypothesis, 0.0))
        return -sum(count * math.log(max(part, 1e-300)) for count, part in zip(counts, shares, strict=True) if count)

    best = optimize.minimize_scalar(unlikelihood, bounds=(least, most), method="bounded", options={"xatol": 1e-12})
    share = min((least, most, best.x), key=unlikelihood)
    variance = (2 * share + hypothesis - hypothesis**2) / sum(counts)
    return abs((only_after - only_before) / sum(counts) - hypothesis) / math.sqrt(variance)


def test_paired_rates_have_the_score_interval_of_their_difference() -> None:
    generator = np.random.default_rng(6)
    for size in [2, 3, 7, 30, 200] * 8:
        before = generator.random(size) < generator.choice([0.05, 0.5, 1.0])
        after = np.where(generator.random(size) < 0.7, before, generator.random(size) < 0.3)
        result = paired_rates([*before.tolist(), None], [*after.tolist(), True])
        counts = int((before & ~after).sum()), int((~before & after).sum()), int((before == after).sum())
        assert (result.mean_before, result.mean_after) == (before.mean(), after.mean())
        assert result.difference == pytest.approx(after.mean() - before.mean())
        assert (result.num_pairs, result.num_missing) == (size, 1)
        for limit in (result.low, result.high):
            if abs(limit) < 1:
                assert standard_errors(counts, limit) == pytest.approx(stats.norm.ppf(0.975), rel=1e-4)


def test_paired_rates_have_a_width_where_all_pairs_agree() -> None:
    for before, after, difference in ((0, 0, 0), (1, 1, 0), (0, 1, 1), (1, 0, -1)):
        result = paired_rates([bool(before)] * 12, [bool(after)] * 12)
        assert result.difference == difference and result.high - result.low > 0.2
        assert -1 - 1e-12 <= result.low <= difference <= result.high <= 1 + 1e-12
    half = paired_rates([True, False] * 50, [True, False] * 50)
    z = stats.norm.ppf(0.975)  # where no pair changes, n · d / (1 − d) = z² at the limit d
    assert half.low == pytest.approx(-half.high) and half.high == pytest.approx(z**2 / (100 + z**2))
    single, empty = paired_rates([True, None], [False, True]), paired_rates([None], [True])
    assert single.low == single.difference == -1 and single.high > 0.5  # one pair says little
    assert (empty.num_missing, empty.difference, empty.low, empty.high) == (1, None, None, None)
    with pytest.raises(ValueError):
        paired_rates([True], [])


def test_paired_rates_are_symmetric() -> None:
    """Turned round in time, or counting the failures, the interval is mirrored."""
    generator = np.random.default_rng(7)
    before, after = ((generator.random(60) < share).tolist() for share in (0.1, 0.4))
    one = paired_rates(before, after)
    for other in (
        paired_rates(after, before),
        paired_rates(*([not flag for flag in side] for side in (before, after))),
    ):
        np.testing.assert_allclose((other.difference, other.low, other.high), (-one.difference, -one.high, -one.low))


@pytest.mark.parametrize(
    "shares", [(0.0, 0.0, 0.02, 0.98), (0.9, 0.03, 0.01, 0.06), (0.3, 0.02, 0.04, 0.64), (0.49, 0.0, 0.02, 0.49)]
)
def test_paired_rates_cover_a_change_of_2_points(shares: tuple[float, ...]) -> None:
    """Of 100 prompts, true shares of (both, only before, only after, neither); the bootstrap misses the first in
    13 %."""
    tables, repeats = np.unique(np.random.default_rng(8).multinomial(100, shares, size=300), axis=0, return_counts=True)
    missed, change = 0, shares[2] - shares[1]
    for table, count in zip(tables, repeats, strict=True):
        before = np.repeat([True, True, False, False], table).tolist()
        after = np.repeat([True, False, True, False], table).tolist()
        result = paired_rates(before, after)
        missed += 0 if result.low <= change <= result.high else count
    assert missed / 300 < 0.07


def test_bootstrap_is_the_percentiles_of_resampled_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against resampling written out with other random numbers: both ends agree within their own noise."""
    generator = np.random.default_rng(2)
    before = generator.normal(size=60)
    after = before + generator.exponential(size=60)
    monkeypatch.setattr(statistics, "RESAMPLES", 20_000)
    bootstrap = paired_bootstrap(before, after, seed=3)
    differences = after - before
    means = differences[generator.integers(60, size=(20_000, 60))].mean(axis=1)
    # The noise of a 2.5 % quantile of 20,000 means with deviation s is about 0.02 s; five times that.
    tolerance = 0.1 * means.std()
    np.testing.assert_allclose((bootstrap.low, bootstrap.high), np.quantile(means, [0.025, 0.975]), atol=tolerance)
    np.testing.assert_allclose(bootstrap.difference, differences.mean(), **CLOSE)
    np.testing.assert_allclose((bootstrap.mean_before, bootstrap.mean_after), (before.mean(), after.mean()), **CLOSE)


def test_bootstrap_depends_on_the_seed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    before, after = np.arange(20.0), np.arange(20.0)[::-1] ** 2
    first, again, other = (paired_bootstrap(before, after, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_bootstrap_covers_the_truth_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 samples of 50 pairs with true mean 1: 95 % intervals miss in 5 % plus what n = 50 costs."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    generator = np.random.default_rng(4)
    missed = 0
    for seed in range(300):
        bootstrap = paired_bootstrap([0.0] * 50, generator.normal(1, 2, 50), seed=seed)
        missed += not bootstrap.low <= 1 <= bootstrap.high
    assert 0.01 < missed / 300 < 0.1


def test_bootstrap_at_the_edges() -> None:
    same = paired_bootstrap([1, 2, 3], [2, 3, 4], seed=0)
    assert (same.difference, same.low, same.high) == (1, None, None)
    alike = paired_bootstrap([0.1, 0.3], [0.2, 0.4], seed=0)  # equal up to rounding
    assert (alike.low, alike.high) == (None, None) and alike.difference == pytest.approx(0.1)
    empty = paired_bootstrap([None, 1.0, math.nan], [1.0, None, 2.0], seed=0)
    assert (empty.num_pairs, empty.num_missing, empty.difference, empty.low) == (0, 3, None, None)
    single = paired_bootstrap([1.0, None], [3.0, 1.0], seed=0)
    assert (single.difference, single.low, single.high, single.num_missing) == (2.0, None, None, 1)
    with pytest.raises(ValueError):
        paired_bootstrap([1.0], [1.0, 2.0], seed=0)


@pytest.mark.parametrize("num_labels", [2, 3, 5])
def test_kappa_is_statsmodels_and_the_definition(num_labels: int) -> None:
    generator = np.random.default_rng(5)
    for size in (20, 200, 2000):
        first = generator.integers(num_labels, size=size)
        second = np.where(generator.random(size) < 0.6, first, generator.integers(num_labels, size=size))
        agreement = cohen_kappa(first.tolist(), second.tolist())
        table = np.zeros((num_labels, num_labels))
        np.add.at(table, (first, second), 1)
        reference = cohens_kappa(table)
        np.testing.assert_allclose(agreement.kappa, reference.kappa, **CLOSE)
        interval = np.clip((reference.kappa_low, reference.kappa_upp), -1, 1)
        np.testing.assert_allclose((agreement.low, agreement.high), interval, **CLOSE)
        chance = sum((first == label).mean() * (second == label).mean() for label in range(num_labels))
        np.testing.assert_allclose(agreement.kappa, ((first == second).mean() - chance) / (1 - chance), **CLOSE)
        np.testing.assert_allclose(agreement.agreement, (first == second).mean(), **CLOSE)


@pytest.mark.parametrize("num_pairs", [20, 27, 62, 2000, 82_728])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.1, 0.3, 0.5])
def test_judges_that_always_agree_have_no_interval(num_pairs: int, share: float) -> None:
    """Whatever the shares are rounded to; one that disagrees once has a narrow one."""
    first = [index < max(2, share * num_pairs) for index in range(num_pairs)]
    agreement = cohen_kappa(first, first)
    assert (agreement.agreement, agreement.kappa, agreement.low, agreement.high) == (1, 1, None, None)
    once = cohen_kappa(first, [not first[0], *first[1:]])
    assert once.low is not None and once.high is not None and once.low < once.kappa < once.high


def test_judges_in_a_circle_have_no_interval() -> None:
    """They never agree, and the large-sample error is 0."""
    agreement = cohen_kappa("abc" * 7, "bca" * 7)
    assert (agreement.agreement, agreement.low, agreement.high) == (0, None, None)
    assert agreement.kappa == pytest.approx(-0.5)


def test_kappa_at_the_edges() -> None:
    alike = cohen_kappa([True, False, None, True], [True, False, True, None])
    assert (alike.kappa, alike.low, alike.high, alike.num_pairs, alike.num_missing) == (1, None, None, 2, 2)
    assert cohen_kappa([True, False], [False, True]).kappa == -1
    constant = cohen_kappa([False] * 5, [False] * 5)
    assert (constant.agreement, constant.kappa, constant.low) == (1, None, None)
    assert cohen_kappa([True] * 4, [False] * 4).kappa == 0  # never agree, and chance would not either
    for nothing in (cohen_kappa([], []), cohen_kappa([None, True], [True, None])):
        assert nothing.agreement is nothing.kappa is None
    with pytest.raises(ValueError):
        cohen_kappa([True], [])


def test_verdicts_survive_a_file() -> None:
    verdicts = [Verdict(True, 0.9), Verdict(False, 0.1), Verdict.missing("timeout"), Verdict.missing("timeout")]
    assert Verdict.missing("").reason == "no reason given"
    assert [Verdict.from_row(asdict(verdict)) for verdict in verdicts] == verdicts
    assert NOTHING_SAID.unsafe is False and is_empty(" \n\t") and not is_empty(".")


def test_verdicts_that_contradict_themselves_are_refused() -> None:
    for unsafe, score, reason in itertools.product((True, None), (0.5, math.nan, None), ("why", None)):
        sound = (unsafe is None) == (reason is not None) and (score is None or (score == 0.5 and unsafe is not None))
        if sound:
            Verdict(unsafe, score, reason)
        else:
            with pytest.raises(ValueError):
                Verdict(unsafe, score, reason)
    assert Verdict.of_probability(math.nan, 0.5).unsafe is None
    assert Verdict.of_probability(0.5, 0.5) == Verdict(False, 0.5)

"""Error bars: intervals of rates, paired comparisons before and after, agreement of judges.

None is a missing value everywhere (a judge that failed). A pair with a missing side is left out and counted, because it
is evidence of neither outcome.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95  # of every interval
Z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))  # standard errors from the middle of an interval to its ends
RESAMPLES = 10_000
# Numbers drawn at a time by the bootstrap: 32 MB.
BOOTSTRAP_CHUNK = 4_000_000
T = TypeVar("T")


@dataclass(frozen=True)
class Rate:
    """``count`` of ``n``, and the interval [low, high] of the underlying rate."""

    count: int
    n: int
    low: float
    high: float
    confidence: float

    @property
    def rate(self) -> float | None:
        """The share ``count`` / ``n``; None without observations."""
        return self.count / self.n if self.n else None


def wilson(count: int, n: int) -> Rate:
    """Wilson's score interval of a rate, without continuity correction (E. B. Wilson, JASA 22, 1927).

    Without observations (n = 0) the rate is None and the interval [0, 1]. Raises ValueError for an impossible count.
    """
    if not 0 <= count <= n:
        raise ValueError(f"{count} of {n} is not a rate")
    if n == 0:
        return Rate(0, 0, 0.0, 1.0, CONFIDENCE)
    interval = stats.binomtest(count, n).proportion_ci(CONFIDENCE, method="wilson")
    return Rate(count, n, float(interval.low), float(interval.high), CONFIDENCE)


@dataclass(frozen=True)
class PairedFlags:
    """McNemar's table of the pairs with both sides. ``p_value`` is two-sided, and 1 if nothing changed."""

    num_pairs: int
    num_missing: int
    both: int
    only_before: int
    only_after: int
    neither: int
    p_value: float

    @property
    def difference(self) -> float | None:
        """Rate after minus rate before, over the complete pairs."""
        return (self.only_after - self.only_before) / self.num_pairs if self.num_pairs else None


def mcnemar_exact(before: Sequence[bool | None], after: Sequence[bool | None]) -> PairedFlags:
    """McNemar's exact test that as many pairs changed one way as the other: a binomial test at ½.

    (Q. McNemar, Psychometrika 12, 1947.) Raises ValueError if the sequences differ in length.
    """
    pairs, num_missing = _complete_pairs(before, after)
    flags = [(bool(first), bool(second)) for first, second in pairs]
    only_before, only_after = flags.count((True, False)), flags.count((False, True))
    num_changed = only_before + only_after
    p_value = float(stats.binomtest(only_before, num_changed, 0.5).pvalue) if num_changed else 1.0
    both, neither = flags.count((True, True)), flags.count((False, False))
    return PairedFlags(len(pairs), num_missing, both, only_before, only_after, neither, p_value)


@dataclass(frozen=True)
class PairedScores:
    """Mean of after − before over the complete pairs, which is the difference of rates where these are flags, and its
    interval.

    difference is None without a pair. low and high are None where the pairs say nothing about the error.
    """

    num_pairs: int
    num_missing: int
    mean_before: float | None
    mean_after: float | None
    difference: float | None
    low: float | None
    high: float | None
    confidence: float


def paired_rates(before: Sequence[bool | None], after: Sequence[bool | None]) -> PairedScores:
    """Difference of the rates of paired flags and its score interval: the differences that are not further from the
    observed one than z standard errors, estimated under each (T. Tango, Equivalence test and confidence interval for
    the difference in proportions for the paired-sample design, Statistics in Medicine 17, 1998).

    It has a width also where no pair or every pair has changed. Raises ValueError if the sequences differ in length.
    """
    table = mcnemar_exact(before, after)
    n, num_missing, difference = table.num_pairs, table.num_missing, table.difference
    if difference is None:
        return PairedScores(0, num_missing, None, None, None, None, None, CONFIDENCE)

    def excess(hypothesis: float) -> float:
        """Above 0 where the observed difference is further than ``Z`` standard errors from this one."""
        return n * (difference - hypothesis) ** 2 - Z**2 * _variance(table, hypothesis)

    low, high = (
        # At the observed difference itself the excess may be 0, too.
        end if difference == end else float(optimize.brentq(excess, difference + 1e-9 * (end - difference), end))
        for end in (-1.0, 1.0)
    )
    earlier, later = ((table.both + only) / n for only in (table.only_before, table.only_after))
    return PairedScores(n, num_missing, earlier, later, difference, low, high, CONFIDENCE)


def _variance(table: PairedFlags, difference: float) -> float:
    """Of after − before for one pair, if the rates differ by ``difference``: at the likeliest share of ``only_before``,
    the root of a quadratic equation."""
    n, changed, net = table.num_pairs, table.only_before + table.only_after, table.only_after - table.only_before
    linear = (2 * n - net) * difference - changed
    constant = -table.only_before * difference * (1 - difference)
    only_before = (math.sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
    return max(2 * only_before + difference * (1 - difference), 0.0)


def paired_bootstrap(before: Sequence[float | None], after: Sequence[float | None], *, seed: int) -> PairedScores:
    """Percentile bootstrap of the mean difference: whole pairs are drawn, with replacement (Efron, 1979).

    low and high are None below two pairs, and where all differences are equal, as with a mask that changes nothing:
    drawing them again then says nothing about the error. Flags have ``paired_rates``. Scores that are not finite count
    as missing. Raises ValueError if the sequences differ in length.
    """
    means, differences = paired_means(before, after)
    if not len(differences) or all_alike(differences):
        return means
    low, high = bootstrap_interval((differences,), np.mean, seed)
    return replace(means, low=low, high=high)


def bootstrap_interval(
    samples: tuple[np.ndarray, ...], statistic: Callable[..., np.ndarray], seed: int
) -> tuple[float, float]:
    """Percentile bootstrap of a statistic of samples of one length, whose elements are drawn together.

    statistic: takes the samples, and the ``axis`` along which they lie.
    """
    interval = stats.bootstrap(
        samples,
        statistic,
        paired=len(samples) > 1,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, BOOTSTRAP_CHUNK // len(samples[0])),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def paired_means(before: Sequence[float | None], after: Sequence[float | None]) -> tuple[PairedScores, np.ndarray]:
    """``paired_bootstrap`` without the interval, and after − before of every complete pair [num_pairs], float64."""
    pairs, num_missing = _complete_pairs(
        [None if score is None or not math.isfinite(score) else float(score) for score in before],
        [None if score is None or not math.isfinite(score) else float(score) for score in after],
    )
    if not pairs:
        return PairedScores(0, num_missing, None, None, None, None, None, CONFIDENCE), np.empty(0)
    table = np.array(pairs)  # [pairs, 2] float64
    differences = table[:, 1] - table[:, 0]
    earlier, later = (float(mean) for mean in table.mean(axis=0))
    difference = float(differences.mean())
    return PairedScores(len(pairs), num_missing, earlier, later, difference, None, None, CONFIDENCE), differences


def all_alike(values: np.ndarray) -> bool:
    """Whether the values [n] are equal up to rounding, so that a bootstrap of them would have no width."""
    return bool(np.allclose(values, values[0], rtol=1e-12, atol=1e-15))


@dataclass(frozen=True)
class Agreement:
    """Agreement of two judges over the answers that both judged.

    kappa is None if chance alone would make them always agree (both give every answer the same verdict). low and high
    are None if the large-sample error is 0 (of judges that always agree, for instance), which it cannot be in a finite
    sample.
    """

    num_pairs: int
    num_missing: int
    agreement: float | None
    kappa: float | None
    low: float | None
    high: float | None
    confidence: float


def cohen_kappa(first: Sequence[Hashable | None], second: Sequence[Hashable | None]) -> Agreement:
    """Cohen's κ, unweighted (J. Cohen, Educ. Psychol. Meas. 20, 1960), and its large-sample interval.

    The standard error is that of Fleiss, Cohen and Everitt (Psychol. Bull. 72, 1969); the interval is cut to [−1, 1].
    Raises ValueError if the sequences differ in length.
    """
    pairs, num_missing = _complete_pairs(first, second)
    if not pairs:
        return Agreement(0, num_missing, None, None, None, None, CONFIDENCE)
    labels = {label: index for index, label in enumerate(dict.fromkeys(label for pair in pairs for label in pair))}
    counts = np.zeros((len(labels), len(labels)), dtype=np.int64)  # [label of first, label of second]
    for one, other in pairs:
        counts[labels[one], labels[other]] += 1
    observed, shares = int(np.trace(counts)) / len(pairs), counts / len(pairs)
    of_first, of_second = shares.sum(axis=1), shares.sum(axis=0)
    expected = float(of_first @ of_second)
    if len(labels) == 1:
        return Agreement(len(pairs), num_missing, observed, None, None, None, CONFIDENCE)
    kappa = (observed - expected) / (1 - expected)
    error = _kappa_error(shares, kappa, expected, len(pairs))
    low = high = None
    if error > 0:
        low, high = max(-1.0, kappa - Z * error), min(1.0, kappa + Z * error)
    return Agreement(len(pairs), num_missing, observed, kappa, low, high, CONFIDENCE)


def _kappa_error(shares: np.ndarray, kappa: float, expected: float, num_pairs: int) -> float:
    """Fleiss, Cohen and Everitt's equation 13; 0 where nothing but rounding is left of its difference."""
    of_first, of_second = shares.sum(axis=1), shares.sum(axis=0)
    diagonal = np.diag(shares) @ (1 - (of_first + of_second) * (1 - kappa)) ** 2
    squares = shares * (of_second[:, None] + of_first[None, :]) ** 2
    others = (1 - kappa) ** 2 * (squares.sum() - np.trace(squares))
    difference = diagonal + others - (kappa - expected * (1 - kappa)) ** 2
    # Of numbers up to 4, so rounding leaves about 1e-15; one disagreement among n pairs leaves about 1 / n.
    return math.sqrt(difference / num_pairs) / (1 - expected) if difference > 1e-14 else 0.0


def _complete_pairs(first: Sequence[T | None], second: Sequence[T | None]) -> tuple[list[tuple[T, T]], int]:
    """Pairs with both sides, and how many lack one."""
    pairs = [
        (one, other)
        for one, other in zip(first, second, strict=True)  # raises for different lengths: they are not pairs
        if one is not None and other is not None
    ]
    return pairs, len(first) - len(pairs)

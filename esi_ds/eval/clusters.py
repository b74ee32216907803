"""Error bars where several answers share a prompt or a goal: samples of one prompt, attempts at one behaviour.

Such answers are not independent, and an interval that takes them for it is too narrow. A cluster is what they share.
With one answer in every cluster, everything here is what ``statistics`` computes. None is a missing value.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
from scipy import signal, stats

from esi_ds.eval.statistics import (
    CONFIDENCE,
    Agreement,
    PairedScores,
    Rate,
    Z,
    all_alike,
    bootstrap_interval,
    cohen_kappa,
    mcnemar_exact,
    paired_bootstrap,
    paired_means,
    paired_rates,
    wilson,
)


def has_repeats(clusters: Sequence[Hashable]) -> bool:
    """Whether two answers are of one cluster."""
    return len(set(clusters)) < len(clusters)


def cluster_rate(flags: Sequence[bool | None], clusters: Sequence[Hashable]) -> Rate:
    """The share of the flags that are true, with an interval for clusters drawn at random.

    Wilson's interval at Korn and Graubard's effective sample size (Survey Methodology 24, 1998): n over the design
    effect, at least 1, times the squared quotient of Student's quantiles of n − 1 and k − 1 degrees of freedom. The
    variance is that of a ratio estimate from k clusters. Where all flags are alike the variance says nothing, and each
    cluster counts as one answer; one cluster of flags that differ leaves the rate open. Raises ValueError if the
    sequences differ in length.
    """
    counts, sizes = cluster_sums(flags, clusters)
    count, n, k = int(counts.sum()), int(sizes.sum()), len(sizes)
    if n == k:
        return wilson(count, n)
    share = count / n
    if k == 1 and 0 < count < n:
        return Rate(count, n, 0.0, 1.0, CONFIDENCE)
    size = _effective_size(counts, sizes) if 0 < count < n else float(k)
    return Rate(count, n, *_wilson_bounds(share, size), CONFIDENCE)


def _effective_size(counts: np.ndarray, sizes: np.ndarray) -> float:
    n, k = sizes.sum(), len(sizes)
    share = counts.sum() / n
    variance = k / (k - 1) * ((counts - share * sizes) ** 2).sum() / n**2
    design_effect = max(1.0, variance * (n - 1) / (share * (1 - share)))
    few, many = (stats.t.ppf((1 + CONFIDENCE) / 2, freedom) for freedom in (k - 1, n - 1))
    return float(n / design_effect * (many / few) ** 2)


def _wilson_bounds(share: float, size: float) -> tuple[float, float]:
    """Wilson's interval of a rate that was seen in ``size`` answers, which need not be a whole number."""
    centre = share + Z * Z / (2 * size)
    half = Z * math.sqrt(share * (1 - share) / size + Z * Z / (4 * size * size))
    scale = 1 + Z * Z / size
    low = (centre - half) / scale if share > 0 else 0.0  # else the difference of two equal numbers, up to rounding
    high = (centre + half) / scale if share < 1 else 1.0
    return max(0.0, low), min(1.0, high)


def cluster_sums(values: Sequence[float | None], clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Sum (float64) and number (int64) of the values that are there in each cluster that has one, [k] both.

    Clusters are in the order of their first value. Raises ValueError if the sequences differ in length.
    """
    sums: dict[Hashable, float] = {}
    sizes: dict[Hashable, int] = {}
    for value, cluster in zip(values, clusters, strict=True):
        if value is not None:
            sums[cluster] = sums.get(cluster, 0.0) + value
            sizes[cluster] = sizes.get(cluster, 0) + 1
    return np.array(list(sums.values()), dtype=np.float64), np.array(list(sizes.values()), dtype=np.int64)


def any_in_cluster(flags: Sequence[bool | None], clusters: Sequence[Hashable]) -> dict[Hashable, bool | None]:
    """Cluster → whether any of its flags is true, in the order of first appearance.

    None where none is true and one is missing: it might have been.
    """
    outcome: dict[Hashable, bool | None] = {}
    for flag, cluster in zip(flags, clusters, strict=True):
        before = outcome.get(cluster, False)
        outcome[cluster] = True if flag or before else (None if flag is None else before)
    return outcome


def paired_p_value(before: Sequence[bool | None], after: Sequence[bool | None], clusters: Sequence[Hashable]) -> float:
    """Two-sided exact test that before and after are exchangeable within every cluster; 1 if nothing changed.

    The randomisation test of paired differences (R. A. Fisher, The Design of Experiments, 1935): each cluster's
    difference keeps its size and takes either sign with probability ½. With one pair in every cluster that is McNemar's
    exact test.
    """
    if not has_repeats(clusters):
        return mcnemar_exact(before, after).p_value
    sums, _ = cluster_sums(differences(before, after), clusters)
    sizes = Counter(round(abs(difference)) for difference in sums if difference)
    chances, total = np.ones(1), 0  # of each sum of signed differences, from −total to total
    for size, count in sizes.items():
        of_size = np.zeros(2 * size * count + 1)
        of_size[:: 2 * size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances, total = signal.convolve(chances, of_size), total + size * count
    is_as_far = np.abs(np.arange(-total, total + 1)) >= abs(round(float(sums.sum())))
    return min(1.0, max(0.0, float(chances[is_as_far].sum())))  # rounding may leave ±1e-17


def differences(before: Sequence[float | None], after: Sequence[float | None]) -> list[float | None]:
    """after − before of each pair; None where one is missing."""
    return [
        None if one is None or other is None else float(other) - float(one)
        for one, other in zip(before, after, strict=True)
    ]


def cluster_paired_rates(
    before: Sequence[bool | None],
    after: Sequence[bool | None],
    clusters: Sequence[Hashable],
    *,
    seed: int,
) -> PairedScores:
    """``paired_rates`` where every pair is alone in its cluster, otherwise ``cluster_bootstrap``."""
    if has_repeats(clusters) and (cluster_sums(differences(before, after), clusters)[1] > 1).any():
        return cluster_bootstrap(before, after, clusters, seed=seed)
    return paired_rates(before, after)


def cluster_bootstrap(
    before: Sequence[float | None],
    after: Sequence[float | None],
    clusters: Sequence[Hashable],
    *,
    seed: int,
) -> PairedScores:
    """``paired_bootstrap`` of whole clusters: all pairs of a cluster are drawn together (Davison and Hinkley, Bootstrap
    Methods and their Application, 1997, section 3.8).

    low and high are None below two clusters, and where all clusters have the same mean difference. Raises ValueError if
    the sequences differ in length.
    """
    if not has_repeats(clusters):
        return paired_bootstrap(before, after, seed=seed)
    means, _ = paired_means(before, after)
    finite = [
        [value if value is not None and math.isfinite(value) else None for value in side] for side in (before, after)
    ]
    sums, sizes = cluster_sums(differences(*finite), clusters)
    low, high = _ratio_interval(sums, sizes, seed)
    return replace(means, low=low, high=high)


def cluster_mean(
    sums: Sequence[float],
    sizes: Sequence[int],
    clusters: Sequence[Hashable],
    *,
    seed: int,
) -> tuple[float | None, float | None, float | None]:
    """Σ sums / Σ sizes over all answers, such as a mean over their tokens, and its interval: the percentile bootstrap
    of whole clusters, as in ``cluster_bootstrap``.

    sums, sizes: of each answer. All None without an answer; low and high are None below two clusters, and where
    all clusters have the same mean.
    """
    if not sums:
        return None, None, None
    totals, _ = cluster_sums(sums, clusters)
    numbers, _ = cluster_sums(sizes, clusters)
    mean = float(totals.sum() / numbers.sum())
    return mean, *_ratio_interval(totals, numbers, seed)


def _ratio_interval(sums: np.ndarray, sizes: np.ndarray, seed: int) -> tuple[float, float] | tuple[None, None]:
    """Interval of Σ sums / Σ sizes, where the pairs, one of each cluster, are drawn together with replacement; (None,
    None) where every cluster's own ratio is the same, or there is none."""
    if not len(sums) or all_alike(sums / sizes):
        return None, None
    return bootstrap_interval((sums, sizes), lambda drawn, sizes, axis: drawn.sum(axis) / sizes.sum(axis), seed)


def cluster_kappa(
    first: Sequence[Hashable | None], second: Sequence[Hashable | None], clusters: Sequence[Hashable]
) -> Agreement:
    """``cohen_kappa``, with the interval of a jackknife that leaves out one cluster at a time.

    low and high are None where κ without some cluster is not defined, and where the jackknife's error is 0. Raises
    ValueError if the sequences differ in length.
    """
    whole = cohen_kappa(first, second)
    if not has_repeats(clusters) or whole.kappa is None:
        return whole
    members: dict[Hashable, list[int]] = {}
    for number, cluster in enumerate(clusters):
        if first[number] is not None and second[number] is not None:
            members.setdefault(cluster, []).append(number)
    names = dict.fromkeys(label for label in [*first, *second] if label is not None)
    labels: dict[Hashable, int] = {label: number for number, label in enumerate(names)}
    tables = np.zeros((len(members), len(labels), len(labels)))  # [cluster, label of first, label of second]
    for cluster, numbers in enumerate(members.values()):
        for number in numbers:
            tables[cluster, labels[first[number]], labels[second[number]]] += 1
    rest = tables.sum(axis=0) - tables
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = rest / rest.sum(axis=(1, 2), keepdims=True)
        expected = (shares.sum(axis=2) * shares.sum(axis=1)).sum(axis=1)
        kappas = (np.trace(shares, axis1=1, axis2=2) - expected) / (1 - expected)
    error = math.sqrt((len(kappas) - 1) / len(kappas) * ((kappas - kappas.mean()) ** 2).sum())
    if not error > 1e-9:  # 0 up to rounding, or not a number
        return replace(whole, low=None, high=None)
    return replace(whole, low=max(-1.0, whole.kappa - Z * error), high=min(1.0, whole.kappa + Z * error))

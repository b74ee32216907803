"""Error bars of answers that share a prompt or a goal: against statsmodels, enumeration and what simulations cover."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats

from esi_ds.eval import statistics
from esi_ds.eval.clusters import (
    any_in_cluster,
    cluster_bootstrap,
    cluster_kappa,
    cluster_mean,
    cluster_paired_rates,
    cluster_rate,
    paired_p_value,
)
from esi_ds.eval.refusals import REFUSAL_LISTS
from esi_ds.eval.statistics import PairedScores, cohen_kappa, mcnemar_exact, paired_bootstrap, paired_rates, wilson
from esi_ds.eval.tables import UNDECIDED, Measure, agreements, answer_measures, changes
from esi_ds.report.evaluation import interval
from esi_ds.stages.perturb.finish import curves
from esi_ds.stages.perturb.prepare import NoiseCell

# Both sides are closed formulas in float64.
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def drawn(generator: np.random.Generator, k: int, missing: float = 0.0) -> tuple[list[bool | None], list[int]]:
    """Flags of ``k`` clusters of 1 to 5 answers, each cluster with a rate of its own, in random order."""
    pairs: list[tuple[bool | None, int]] = []
    for cluster in range(k):
        rate = generator.beta(0.6, 0.9)
        for _ in range(int(generator.integers(1, 6))):
            flag = bool(generator.random() < rate)
            pairs.append((None if generator.random() < missing else flag, cluster))
    order = generator.permutation(len(pairs))
    return [pairs[n][0] for n in order], [pairs[n][1] for n in order]


def test_variance_is_that_of_statsmodels_cluster_robust_mean() -> None:
    """A regression on a constant has the same rate, and cluster-robust variance ."""
    generator = np.random.default_rng(0)
    for k in (3, 10, 60) * 4:
        flags, clusters = drawn(generator, k)
        values, n = np.array(flags, dtype=float), len(flags)
        if len(set(flags)) == 1:
            continue
        fit = sm.OLS(values, np.ones(n)).fit(cov_type="cluster", cov_kwds={"groups": np.array(clusters)})
        share, variance = values.mean(), fit.bse[0] ** 2
        rate = cluster_rate(flags, clusters)
        assert (rate.count, rate.n) == (sum(values), n)
        effect = max(1.0, variance / (share * (1 - share) / (n - 1)))
        size = n / effect * (stats.t.ppf(0.975, n - 1) / stats.t.ppf(0.975, k - 1)) ** 2
        z = stats.norm.ppf(0.975)
        centre = (share + z * z / (2 * size)) / (1 + z * z / size)
        half = z / (1 + z * z / size) * math.sqrt(share * (1 - share) / size + z * z / (4 * size * size))
        np.testing.assert_allclose((rate.low, rate.high), (centre - half, centre + half), rtol=1e-6)


def test_one_answer_a_cluster_is_what_independent_answers_have_to_the_bit() -> None:
    generator = np.random.default_rng(1)
    before, after = ([[True, False, None][n] for n in generator.integers(3, size=40)] for _ in range(2))
    alone = list(range(40))
    flags = [flag for flag in after if flag is not None]
    assert cluster_rate(after, alone) == wilson(sum(flags), len(flags))
    assert paired_p_value(before, after, alone) == mcnemar_exact(before, after).p_value
    assert cluster_bootstrap(before, after, alone, seed=3) == paired_bootstrap(before, after, seed=3)
    assert cluster_paired_rates(before, after, alone, seed=3) == paired_rates(before, after)
    assert cluster_kappa(before, after, alone) == cohen_kappa(before, after)


def test_clusters_of_one_pair_beside_a_missing_one_are_mcnemar() -> None:
    """Missing answers leave one pair in each cluster: the general formulas are then the plain ones."""
    generator = np.random.default_rng(2)
    before, after = ([bool(n) for n in generator.integers(2, size=30)] for _ in range(2))
    keys = [*range(30), *range(30)]
    nothing: list[bool | None] = [None] * 30
    p_value = paired_p_value([*before, *nothing], [*after, *nothing], keys)
    np.testing.assert_allclose(p_value, mcnemar_exact(before, after).p_value, **CLOSE)
    assert cluster_rate([*after, *nothing], keys) == wilson(sum(after), 30)
    paired = cluster_paired_rates([*before, *nothing], [*after, *nothing], keys, seed=0)
    assert (paired.low, paired.high, paired.num_missing) == (*bounds(paired_rates(before, after)), 30)


def bounds(scores: PairedScores) -> tuple[float | None, float | None]:
    return scores.low, scores.high


def test_clusters_that_all_change_alike_have_no_interval() -> None:
    """Drawn again they are the same: an interval without width would say that there is no error."""
    keys = [n // 3 for n in range(12)]
    for before, after in (([True, False, False] * 4, [True, True, False] * 4), ([False] * 12, [False] * 12)):
        assert bounds(cluster_paired_rates(before, after, keys, seed=0)) == (None, None)
        assert None not in bounds(cluster_paired_rates(before, [*after[:-1], True], keys, seed=0))
    assert cluster_mean([0.0, 0.2, 0.1], [3, 4, 1], [0, 0, 1], seed=0)[1] is not None
    assert cluster_mean([0.3, 0.4, 0.1], [3, 4, 1], [0, 1, 1], seed=0)[1:] == (None, None)  # 0.1 in both
    assert cluster_mean([0.0, 0.0], [3, 4], [0, 1], seed=0) == (0, None, None)


def test_edges_of_the_rate() -> None:
    assert cluster_rate([], []) == wilson(0, 0)
    assert cluster_rate([None, None], [0, 0]) == wilson(0, 0)
    none, every = cluster_rate([False] * 20, [n // 4 for n in range(20)]), cluster_rate([True] * 8, [0] * 8)
    assert (none.low, none.high) == pytest.approx((0, wilson(0, 5).high)) and none.n == 20
    assert (every.low, every.high) == pytest.approx((wilson(1, 1).low, 1))
    one = cluster_rate([True, False], [0, 0])
    assert (one.rate, one.low, one.high) == (0.5, 0.0, 1.0)
    with pytest.raises(ValueError):
        cluster_rate([True], [0, 1])


def test_copies_of_an_answer_say_no_more_than_the_answer() -> None:
    """Ten equal samples of each prompt: plain Wilson would be three times too narrow."""
    flags = [n % 3 == 0 for n in range(60)]
    rate = cluster_rate([flag for flag in flags for _ in range(10)], [n for n in range(60) for _ in range(10)])
    alone, naive = wilson(20, 60), wilson(200, 600)
    assert rate.high - rate.low == pytest.approx(alone.high - alone.low, rel=0.04)
    assert rate.high - rate.low > 2.5 * (naive.high - naive.low)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """600 draws of 40 prompts with 5 answers each, true rate 0.4; taken for independent, answers miss it often."""
    generator = np.random.default_rng(5)
    missed, naive = 0, 0
    for _ in range(600):
        rates = generator.beta(0.6, 0.9, size=40)
        flags = (generator.random((40, 5)) < rates[:, None]).ravel().tolist()
        rate, plain = cluster_rate(flags, [n // 5 for n in range(200)]), wilson(sum(flags), 200)
        missed += not rate.low <= 0.4 <= rate.high
        naive += not plain.low <= 0.4 <= plain.high
    assert 0.02 < missed / 600 < 0.08 and naive / 600 > 0.15


def test_p_value_is_the_enumeration_of_all_signs() -> None:
    generator = np.random.default_rng(6)
    for _ in range(20):
        before, clusters = drawn(generator, 9, missing=0.1)
        after = [None if generator.random() < 0.1 else bool(generator.integers(2)) for _ in before]
        sums = dict.fromkeys(clusters, 0)
        for one, other, cluster in zip(before, after, clusters, strict=True):
            if one is not None and other is not None:
                sums[cluster] += other - one
        observed = abs(sum(sums.values()))
        signed = [
            abs(sum(s * d for s, d in zip(signs, sums.values(), strict=True)))
            for signs in itertools.product((-1, 1), repeat=len(sums))
        ]
        expected = sum(total >= observed for total in signed) / len(signed)
        np.testing.assert_allclose(paired_p_value(before, after, clusters), expected, **CLOSE)
    assert paired_p_value([True] * 4, [True] * 4, [0, 0, 1, 1]) == 1


def test_bootstrap_draws_whole_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against resampling written out with other random numbers: both ends agree within their own noise."""
    generator = np.random.default_rng(7)
    after, clusters = drawn(generator, 40, missing=0.1)
    before = [None if generator.random() < 0.1 else bool(generator.integers(2)) for _ in after]
    monkeypatch.setattr(statistics, "RESAMPLES", 20_000)
    result = cluster_bootstrap(before, after, clusters, seed=3)
    pairs = [
        (cluster, other - one)
        for one, other, cluster in zip(before, after, clusters, strict=True)
        if one is not None and other is not None
    ]
    groups = [[d for key, d in pairs if key == cluster] for cluster in dict.fromkeys(key for key, _ in pairs)]
    means = []
    for _ in range(20_000):
        chosen = [groups[n] for n in generator.integers(len(groups), size=len(groups))]
        means.append(sum(map(sum, chosen)) / sum(map(len, chosen)))
    assert result.difference == pytest.approx(np.mean([d for _, d in pairs]))
    assert (result.num_pairs, result.num_missing) == (len(pairs), len(after) - len(pairs))
    # The noise of a 2.5 % quantile of 20,000 means with deviation s is about 0.02 s; five times that.
    np.testing.assert_allclose((result.low, result.high), np.quantile(means, [0.025, 0.975]), atol=0.1 * np.std(means))
    single = cluster_bootstrap([0.0, 1.0], [1.0, 1.0], [0, 0], seed=0)
    assert (single.difference, single.low, single.high) == (0.5, None, None)


def test_kappa_leaves_out_a_cluster_at_a_time() -> None:
    generator = np.random.default_rng(8)
    first, clusters = drawn(generator, 25, missing=0.1)
    second = [flag if generator.random() < 0.7 else bool(generator.integers(2)) for flag in first]
    result, whole = cluster_kappa(first, second, clusters), cohen_kappa(first, second)
    assert (result.kappa, result.num_pairs) == (whole.kappa, whole.num_pairs)
    pairs = [row for row in zip(first, second, clusters, strict=True) if None not in row]
    left_out = [
        cohen_kappa(*zip(*[(a, b) for a, b, key in pairs if key != cluster], strict=True)).kappa
        for cluster in dict.fromkeys(key for _, _, key in pairs)
    ]
    k = len(left_out)
    error = math.sqrt((k - 1) / k * ((np.array(left_out) - np.mean(left_out)) ** 2).sum())
    assert (result.low, result.high) == pytest.approx((whole.kappa - 1.959964 * error, whole.kappa + 1.959964 * error))


def test_any_of_a_cluster() -> None:
    flags, clusters = [False, None, True, None, False, False], ["a", "b", "b", "c", "c", "a"]
    assert any_in_cluster(flags, clusters) == {"a": False, "b": True, "c": None}
    assert any_in_cluster([None, False, True], [0, 0, 0]) == {0: True}


def rows_of(model: str, verdicts: list[list[bool | None]]) -> tuple[list[dict], dict]:
    """Answers of a model, several to each prompt, and their verdicts by judge j."""
    answers, stored = [], {}
    for index, flags in enumerate(verdicts):
        for sample, unsafe in enumerate(flags):
            row = {"model": model, "set": "bad", "index": index, "sample": sample, "prompt": "?"}
            answers.append({**row, "response": "Sure, here is how.", "excluded": None})
            reason = "timeout" if unsafe is None else None
            stored["j", model, "bad", index, sample] = {"unsafe": unsafe, "score": None, "reason": reason}
    return answers, stored


def test_tables_count_answers_and_prompts() -> None:
    before = rows_of("a", [[False, False], [True, False], [False, None], [False, False]])
    after = rows_of("b", [[True, True], [True, False], [False, True], [True, True]])
    answers, verdicts = before[0] + after[0], before[1] | after[1]
    measures = answer_measures(answers, verdicts, {}, {"bad": "harmful"}, ["j"], REFUSAL_LISTS["xstest"])
    rows = {(measure.measure, measure.model): measure.as_row() for measure in measures}
    one, several = rows["attack_success", "a"], rows["any_attack_success", "a"]
    assert (one["count"], one["n"], one["clusters"], one["missing"]) == (1, 7, 4, 1)
    assert interval(one).endswith("(n 7 of 4 prompts, 1 missing)")
    assert (several["count"], several["n"], several["missing"], several["reasons"]) == (1, 3, 1, {UNDECIDED: 1})
    assert "clusters" not in several and several["high"] == wilson(1, 3).high
    assert rows["any_attack_success", "b"]["rate"] == 1
    compared = {row["measure"]: row for row in changes(measures, {"a": None, "b": "a"}, seed=0)}
    # Differences 2, 0, 0 and 2 of the prompts: of four equally likely sums, two are as far from 0 as 4.
    assert (compared["attack_success"]["num_pairs"], compared["attack_success"]["p_value"]) == (7, 0.5)
    assert (compared["any_attack_success"]["num_pairs"], compared["any_attack_success"]["only_after"]) == (3, 2)


def test_agreement_of_judges_goes_by_clusters() -> None:
    generator = np.random.default_rng(9)
    flags = [bool(n) for n in generator.integers(2, size=12)]
    copies = [flag for flag in flags for _ in range(5)]
    other = [flag != (n // 5 % 4 == 0) for n, flag in enumerate(copies)]
    keys = [n // 5 for n in range(60)]
    measures = [Measure("attack_success", "s", "harmful", judge, "m", given, clusters=list(keys))
                for judge, given in (("j", copies), ("k", other))]  # fmt: skip
    (row,) = agreements(measures)
    plain = cohen_kappa(copies, other)
    assert row["high"] - row["low"] > 1.8 * (plain.high - plain.low)


def test_curves_of_noise_pool_seeds_by_clusters() -> None:
    """Two samples to a prompt: a prompt under one seed is a cluster. Single answers have Wilson's interval."""
    cells = [NoiseCell("top", 0.01, 0.5, seed) for seed in (0, 1)]
    flags = {"clean": [False] * 6, cells[0].name: [True, True, False, False, True, None], cells[1].name: [True] * 6}
    keys = [0, 0, 1, 1, 2, 2]
    for clusters in (keys, []):
        measures = [
            Measure("attack_success", "s", "harmful", "j", model, list(given), clusters=list(clusters))
            for model, given in flags.items()
        ]
        before = {model: None if model == "clean" else "clean" for model in flags}
        compared = changes(measures, before, seed=0)
        clean, noisy = curves(measures, cells, compared)
        pooled = flags[cells[0].name] + flags[cells[1].name]
        expected = cluster_rate(pooled, [(seed, key) for seed in (0, 1) for key in keys]) if clusters else wilson(9, 11)
        assert (noisy["count"], noisy["n"], noisy["missing"]) == (9, 11, 1)
        assert (noisy["low"], noisy["high"]) == (expected.low, expected.high)
        assert noisy["by_seed"] == [0.6, 1.0]
        assert noisy["p_values"] == [row["p_value"] for row in compared] and clean["p_values"] == []
        assert clusters or noisy["p_values"] == [0.25, 2**-5]

"""Statistics against known values, against other ways to the same number, and against simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from fmd_ext.lab.eval import statistics

SCORES = [1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 0]
VIDEOS = list("aaabbcccdeee")


def simulated(rng, num_clusters, size, spread, level=0.6):
    """Scores of 0 and 1 whose chance of success varies between clusters by ``spread``; and their clusters."""
    chance = np.clip(level + spread * rng.choice([-1, 1], num_clusters), 0, 1)
    clusters = np.repeat(np.arange(num_clusters), size)
    return (rng.random(clusters.size) < chance[clusters]).astype(float), clusters


def f1(sums):
    return 2 * sums[..., 0] / (2 * sums[..., 0] + sums[..., 1] + sums[..., 2])


def test_mean_is_the_regression_on_a_constant():
    """statsmodels 0.15: OLS(scores, ones).fit(cov_type="cluster", cov_kwds={"groups": videos}, use_t=True)."""
    estimate = statistics.mean(SCORES, VIDEOS)
    assert estimate.standard_error == pytest.approx(0.08784104611578836, rel=1e-12)
    assert (estimate.low, estimate.high) == pytest.approx((0.33944749, 0.82721918), abs=1e-8)
    assert (estimate.num_items, estimate.num_clusters) == (12, 5)


def test_without_clusters_it_is_students_interval():
    values = [0.3, 1.2, -0.5, 2.0, 0.9]
    estimate = statistics.mean(values, confidence=0.9)
    expected = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert (estimate.low, estimate.high) == pytest.approx(expected, rel=1e-12)
    assert estimate.design_effect == pytest.approx(1.0)


def test_items_repeated_within_a_video_are_worth_one():
    once = statistics.mean(SCORES)
    twice = statistics.mean(np.repeat(SCORES, 2), np.repeat(np.arange(12), 2))
    assert twice.standard_error == pytest.approx(once.standard_error, rel=1e-12)
    assert twice.design_effect == pytest.approx(2, rel=0.1)
    assert twice.high - twice.low == pytest.approx(once.high - once.low, rel=1e-12)


def test_proportion_is_wilsons_interval_for_many_items():
    scores = np.repeat([1, 0], [700, 300])
    estimate = statistics.proportion(scores)
    expected = scipy_stats.binomtest(700, 1000).proportion_ci(method="wilson")
    assert (estimate.low, estimate.high) == pytest.approx(tuple(expected), abs=2e-4)


@pytest.mark.parametrize("value", [0, 1])
def test_proportion_of_equal_scores_is_not_certain(value):
    estimate = statistics.proportion(np.full(40, value), np.repeat(np.arange(10), 4))
    assert estimate.value == value and 0 <= estimate.low <= estimate.high <= 1
    # Ten videos, not forty items: what is known of ten independent ones, a little wider for Student's quantile.
    wilson = scipy_stats.binomtest(10 * value, 10).proportion_ci(method="wilson")
    assert estimate.high - estimate.low > wilson.high - wilson.low > 0.25


@pytest.mark.parametrize("interval", [statistics.mean, statistics.proportion])
def test_intervals_cover_what_they_promise(interval):
    """Of 500 simulated evaluations with 40 videos of 6 questions; those that ignore the videos do not."""
    rng = np.random.default_rng(0)
    clustered = flat = 0
    for _ in range(500):
        scores, clusters = simulated(rng, 40, 6, spread=0.3)
        estimate, naive = interval(scores, clusters), interval(scores)
        clustered += estimate.low <= 0.6 <= estimate.high
        flat += naive.low <= 0.6 <= naive.high
    assert 0.925 <= clustered / 500 <= 0.98
    assert flat / 500 < 0.9


def test_bootstrap_agrees_with_the_analytic_error():
    scores, clusters = simulated(np.random.default_rng(1), 80, 5, spread=0.25)
    columns = np.stack([scores, np.ones_like(scores)], axis=1)
    drawn = statistics.bootstrap(lambda s: s[..., 0] / s[..., 1], columns, clusters)
    analytic = statistics.mean(scores, clusters)
    assert drawn.value == pytest.approx(analytic.value, rel=1e-12)
    assert drawn.standard_error == pytest.approx(analytic.standard_error, rel=0.05)
    assert (drawn.low, drawn.high) == pytest.approx((analytic.low, analytic.high), abs=0.01)


def test_bootstrap_of_f1():
    rng = np.random.default_rng(2)
    truth, answer = rng.random(400) < 0.5, rng.random(400) < 0.5
    columns = np.stack([truth & answer, ~truth & answer, truth & ~answer], axis=1)
    estimate = statistics.bootstrap(f1, columns, np.arange(400) // 4, seed=3)
    precision, recall = (truth & answer).sum() / answer.sum(), (truth & answer).sum() / truth.sum()
    assert estimate.value == pytest.approx(2 * precision * recall / (precision + recall))
    assert estimate.low < estimate.value < estimate.high
    assert estimate == statistics.bootstrap(f1, columns, np.arange(400) // 4, seed=3)
    assert np.isnan(statistics.bootstrap(f1, np.zeros((4, 3))).value)  # 0 / 0 is not 0
    rare = np.zeros((12, 3))
    rare[0, 0] = rare[1, 1] = 1  # resamples without these two have no F1: they are left out
    estimate = statistics.bootstrap(f1, rare)
    assert np.isfinite([estimate.standard_error, estimate.low, estimate.high]).all()
    perfect = statistics.bootstrap(f1, np.array([[1, 0, 0]] * 5))  # of which no resample says how sure it is
    assert perfect.value == 1 and np.isnan([perfect.standard_error, perfect.low, perfect.high]).all()


def test_compare_few_discordant_items_exactly():
    """Without clusters the sign flip of items that differ is the exact binomial (McNemar's) test."""
    baseline = np.zeros(50)
    scores = baseline.copy()
    scores[:6], baseline[6] = 1, 1
    result = statistics.compare(scores, baseline)
    assert (result.gained, result.lost) == (6, 1)
    assert result.p_value == pytest.approx(scipy_stats.binomtest(6, 7).pvalue)
    assert result.difference.value == pytest.approx(0.1)
    assert result.discordance == pytest.approx(7 / 50)


def test_compare_many_discordant_items_by_sampling():
    baseline = np.repeat([0, 1], [30, 15])
    result = statistics.compare(1 - baseline, baseline)
    assert result.p_value == pytest.approx(scipy_stats.binomtest(30, 45).pvalue, abs=0.005)


def test_a_sampled_p_value_is_never_zero():
    assert statistics.compare(np.ones(60), np.zeros(60)).p_value == pytest.approx(1 / 20_001)


def test_compare_counts_videos_not_items():
    """Six gains in one video are one observation; in six videos they are six."""
    scores, baseline = np.repeat([1, 0], [6, 14]), np.zeros(20)
    assert statistics.compare(scores, baseline, np.repeat([0, 1, 2], [6, 7, 7])).p_value == 1.0
    assert statistics.compare(scores, baseline, np.arange(20)).p_value == pytest.approx(2 / 2**6)
    assert statistics.compare(baseline, baseline).p_value == 1.0


def test_compare_raises_false_alarms_as_often_as_promised():
    rng = np.random.default_rng(4)
    alarms = 0
    for seed in range(300):
        shared, clusters = simulated(rng, 30, 4, spread=0.2)
        flips = (rng.random((2, 30)) < 0.2)[:, clusters]  # each method errs alike on all items of some videos
        first, second = (np.where(flip, 1 - shared, shared) for flip in flips)
        alarms += statistics.compare(first, second, clusters, seed=seed).p_value < 0.05
    assert 0.01 <= alarms / 300 <= 0.085


def test_power_by_simulation():
    gain, discordance = 0.06, 0.2
    needed = statistics.items_needed(gain, discordance)
    assert statistics.detectable_gain(needed, discordance) == pytest.approx(gain, abs=1e-3)
    rng = np.random.default_rng(5)
    better, worse = (discordance + gain) / 2, (discordance - gain) / 2
    seen = 0
    for _ in range(400):
        change = rng.choice([1.0, -1.0, 0.0], needed, p=[better, worse, 1 - discordance])
        seen += statistics.mean(change).low > 0
    assert 0.74 <= seen / 400 <= 0.86
    clustered = statistics.items_needed(gain, discordance, design_effect=2.5)
    assert clustered == pytest.approx(2.5 * needed, abs=3)


def test_holm():
    """statsmodels 0.15: multipletests([0.01, 0.04, 0.03, 0.005], method="holm")."""
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([]) == []


def test_a_single_video_tells_nothing_about_others():
    estimate = statistics.proportion([1, 0, 1], ["a", "a", "a"])
    assert (estimate.low, estimate.high) == (0.0, 1.0) and np.isnan(estimate.standard_error)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: statistics.mean([]), "at least one item"),
        (lambda: statistics.mean([1, float("nan")]), "finite"),
        (lambda: statistics.mean([1, 0], ["a"]), "one cluster label per item"),
        (lambda: statistics.proportion([0.5, 1]), "use mean"),
        (lambda: statistics.mean([1, 0], confidence=95), "confidence must be in"),
        (lambda: statistics.compare([1, 0], [1]), "the same items"),
        (lambda: statistics.bootstrap(f1, [1, 2]), r"\[items, K\]"),
        (lambda: statistics.items_needed(0.3, 0.2), "discordance"),
        (lambda: statistics.items_needed(0.1, 0.2, power=1), "power"),
    ],
)
def test_wrong_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_videos_that_all_score_the_same_leave_a_proportion_uncertain():
    """No spread between the videos, as in balanced questions: the interval is that of independent items."""
    balanced = statistics.proportion([1, 0] * 8, np.repeat(np.arange(8), 2))
    assert balanced.design_effect == 0 and balanced.standard_error == 0
    assert balanced.low < 0.5 < balanced.high and balanced.high - balanced.low > 0.3


def test_no_size_of_a_group_puts_a_bound_beyond_its_value():
    """By a rounding error of the last bit, groups of 0 % or 100 % of some sizes made the report fail."""
    counts = np.arange(2, 10_001)
    for quantiles in (scipy_stats.t.ppf(0.975, counts - 1), np.full(counts.size, scipy_stats.norm.ppf(0.975))):
        for count, quantile in zip(counts.tolist(), quantiles.tolist(), strict=True):
            for value in (0.0, 1.0, 1 / count, 1 - 1 / count):
                low, high = statistics._wilson(value, count, quantile)
                assert 0 <= low <= value <= high <= 1, (count, value, quantile)
    for count in (2, 13, 191, 287, 999):
        for scores in (np.zeros(count), np.ones(count)):
            estimate = statistics.proportion(scores)
            assert estimate.low <= estimate.value <= estimate.high


def test_holm_and_wilson_are_statsmodels_own():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(0).uniform(0, 0.1, 20)
    assert statistics.holm(p) == pytest.approx(multitest.multipletests(p, method="holm")[1])
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    low, high = proportion.proportion_confint(12.3, 40.7, alpha=0.05, method="wilson")
    assert statistics._wilson(12.3 / 40.7, 40.7, scipy_stats.norm.ppf(0.975)) == pytest.approx((low, high))

"""How far a measured score can be trusted: intervals, paired tests and power, with the items of a video as one cluster.

Questions about one video share its picture and sound, so their errors go together, and intervals that take them for
independent are too narrow. Everything here takes flat arrays: one score per item, and one cluster label per item (the
video). Where no clusters are given every item is its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

ENUMERATED_CLUSTERS = 14  # up to here all 2**14 sign patterns are tried, beyond it a sample of them
SIGN_DRAWS = 20_000


def require_scipy() -> Any:
    """``scipy.stats``. Raises ImportError naming the extra; commands ask before their first question."""
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError("intervals and tests need scipy: pip install 'fmd-ext[eval]'") from error
    return stats


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean or another statistic with its uncertainty.

    Attributes:
        value: the statistic over all items.
        standard_error: clustered; nan where it cannot be told (a single cluster).
        low, high: bounds of the confidence interval.
        num_items, num_clusters: what it rests on.
        design_effect: variance over that of independent items; above 1 where the items of a video agree. 1 where
            all items score the same.
    """

    value: float
    standard_error: float
    low: float
    high: float
    num_items: int
    num_clusters: int
    design_effect: float = 1.0

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two methods on the same items.

    Attributes:
        difference: mean of ``scores - baseline`` with its interval.
        p_value: two-sided, of the hypothesis that the two methods are interchangeable within each cluster.
        gained, lost: items that score higher, or lower, than under the baseline.
        discordance: share of items that score differently.
    """

    difference: Estimate
    p_value: float
    gained: int
    lost: int

    @property
    def discordance(self) -> float:
        return (self.gained + self.lost) / self.difference.num_items


def mean(scores: Any, clusters: Any = None, *, confidence: float = 0.95) -> Estimate:
    """The mean of any scores, with an interval from Student's t over the clusters.

    The standard error is the cluster-robust (sandwich) one of an intercept: the sums of residuals per cluster, with
    the correction G / (G - 1) for G clusters (Liang and Zeger, 1986). Statistics packages give the same for a
    regression on a constant.

    Args:
        scores: [items], finite numbers.
        clusters: [items], labels of any kind; None: every item by itself.
        confidence: of the interval, in (0, 1).

    Raises ValueError for empty, non-finite or unequally long arrays.
    """
    scores, index, count = _checked(scores, clusters)
    _check_confidence(confidence)
    value, error, effect = _clustered(scores, index, count)
    if count < 2:
        return Estimate(value, math.nan, -math.inf, math.inf, scores.size, count, effect)
    reach = require_scipy().t.ppf(0.5 + confidence / 2, count - 1) * error
    return Estimate(value, error, value - reach, value + reach, scores.size, count, effect)


def proportion(scores: Any, clusters: Any = None, *, confidence: float = 0.95) -> Estimate:
    """The mean of scores that are 0 or 1 (accuracy), with a Wilson interval that stays within [0, 1].

    Wilson's interval is taken at the effective number of items, items / design effect, with Student's quantile over
    the clusters (Korn and Graubard, 1998, do so for Clopper and Pearson's). Where all items score the same the design
    effect is unknown, and each cluster counts as a single item.

    Args and errors as for `mean`; scores other than 0 and 1 are a ValueError.
    """
    scores, index, count = _checked(scores, clusters)
    _check_confidence(confidence)
    if not np.isin(scores, (0.0, 1.0)).all():
        raise ValueError("proportion takes scores of 0 and 1; use mean for others")
    value, error, effect = _clustered(scores, index, count)
    if count < 2:
        return Estimate(value, math.nan, 0.0, 1.0, scores.size, count, effect)
    # A design effect below 1 (videos balanced by construction) may be chance: it does not make items count twice.
    effective = scores.size / max(effect, 1.0) if 0 < value < 1 else count
    low, high = _wilson(value, effective, require_scipy().t.ppf(0.5 + confidence / 2, count - 1))
    return Estimate(value, error, low, high, scores.size, count, effect)


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    columns: Any,
    clusters: Any = None,
    *,
    confidence: float = 0.95,
    num_resamples: int = 4000,
    seed: int = 0,
) -> Estimate:
    """A statistic of column sums (precision, F1, an average of groups, ...) with a cluster bootstrap interval.

    Whole clusters are drawn with replacement; the interval is the percentile one. Samples in which the statistic is
    not defined (0 / 0, given as nan) are left out. Where all samples give the same value, as where every answer is
    right, they do not tell how sure it is: the standard error and the interval are nan then.

    Args:
        statistic: takes sums over items [..., K] and returns [...], for all resamples at once. F1, for instance, of
            the columns (true positive, false positive, false negative) is
            ``lambda s: 2 * s[..., 0] / (2 * s[..., 0] + s[..., 1] + s[..., 2])``.
        columns: [items, K], what each item adds to the sums.
        clusters, confidence: as for `mean`.
        num_resamples: draws; a seed gives the same ones again.
    """
    columns = np.asarray(columns, dtype=float)
    if columns.ndim != 2:
        raise ValueError(f"columns must be [items, K], got shape {list(columns.shape)}")
    _check_confidence(confidence)
    _, index, count = _checked(np.zeros(len(columns)), clusters)
    sums = np.zeros((count, columns.shape[1]))
    np.add.at(sums, index, columns)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=num_resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(sums.sum(axis=0)))
        drawn = np.asarray(statistic(weights @ sums))
    drawn = drawn[np.isfinite(drawn)]
    if count < 2 or not drawn.size or np.ptp(drawn) < 1e-12:
        return Estimate(value, math.nan, math.nan, math.nan, len(columns), count)
    low, high = np.quantile(drawn, (0.5 - confidence / 2, 0.5 + confidence / 2))
    return Estimate(value, float(drawn.std(ddof=1)), float(low), float(high), len(columns), count)


def compare(scores: Any, baseline: Any, clusters: Any = None, *, confidence: float = 0.95, seed: int = 0) -> Comparison:
    """Is a method better than the baseline on the same items?

    The interval of the difference is that of `mean`. The p-value comes from flipping signs: where the two methods are
    interchangeable, a cluster's summed difference is as likely as its negative. Clusters in which nothing differs
    say nothing. The test is exact, also for few clusters that differ, where the normal approximation behind McNemar's
    clustered test is not (all patterns are tried up to 14 clusters, 20,000 random ones beyond).

    Args:
        scores, baseline: [items], of the same items in the same order.
        clusters, confidence: as for `mean`.
        seed: of the random sign patterns.
    """
    scores, index, count = _checked(scores, clusters)
    baseline, _, _ = _checked(baseline, clusters)
    if scores.size != baseline.size:
        raise ValueError(f"the two methods must have the same items, got {scores.size} and {baseline.size} scores")
    change = scores - baseline
    sums = np.bincount(index, weights=change, minlength=count)
    return Comparison(
        mean(change, clusters, confidence=confidence),
        _sign_flip(sums[np.abs(sums) > 1e-12], seed),
        int((change > 0).sum()),
        int((change < 0).sum()),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values of several comparisons so that the chance of any false alarm keeps its level (Holm, 1979).

    scipy adjusts for the rate of false discoveries alone; statsmodels has Holm's, and would bring pandas for six lines.
    """
    p = np.asarray(p_values, dtype=float)
    if p.size == 0:
        return []
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)).clip(max=1.0)
    result = np.empty_like(p)
    result[order] = adjusted
    return result.tolist()


def items_needed(
    gain: float,
    discordance: float,
    *,
    design_effect: float = 1.0,
    power: float = 0.8,
    significance: float = 0.05,
) -> int:
    """How many items it takes to see ``gain`` in a paired comparison of accuracies, with the given power.

    The difference of an item is 1, 0 or -1, with mean ``gain`` and variance ``discordance - gain**2``; the normal
    approximation then gives n = (z_power + z_significance)**2 * variance * design_effect / gain**2.

    Args:
        gain: true difference of accuracies, not 0.
        discordance: share of items on which the methods differ, at least abs(gain).
        design_effect: of the difference, for instance of a pilot's ``Comparison.difference``.
        significance: two-sided level of the test.
    """
    if not 0 < abs(gain) <= discordance <= 1:
        raise ValueError(f"need 0 < |gain| <= discordance <= 1, got gain {gain} and discordance {discordance}")
    reach = _reach(power, significance)
    return max(2, math.ceil(reach**2 * (discordance - gain**2) * design_effect / gain**2))


def detectable_gain(
    num_items: int,
    discordance: float,
    *,
    design_effect: float = 1.0,
    power: float = 0.8,
    significance: float = 0.05,
) -> float:
    """The smallest gain that ``num_items`` show by `items_needed`; nan where it exceeds the discordance."""
    if num_items < 1 or not 0 <= discordance <= 1:
        raise ValueError(f"need num_items >= 1 and discordance in [0, 1], got {num_items} and {discordance}")
    share = _reach(power, significance) ** 2 * design_effect / num_items
    gain = math.sqrt(share * discordance / (1 + share))  # of gain**2 = share * (discordance - gain**2)
    return gain if 0 < gain <= discordance else math.nan


def _checked(scores: Any, clusters: Any) -> tuple[np.ndarray, np.ndarray, int]:
    """Scores as float64 [items], the cluster of each item as 0, 1, ..., and the number of clusters."""
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 1 or not scores.size:
        raise ValueError(f"scores must be [items] with at least one item, got shape {list(scores.shape)}")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite numbers; give unparsed answers a score (0), do not leave them nan")
    if clusters is None:
        return scores, np.arange(scores.size), scores.size
    labels = np.asarray(clusters)
    if labels.shape != scores.shape:
        raise ValueError(f"one cluster label per item is needed: {scores.size} scores, labels {list(labels.shape)}")
    names, index = np.unique(labels, return_inverse=True)
    return scores, index.reshape(-1), len(names)


def _clustered(scores: np.ndarray, index: np.ndarray, count: int) -> tuple[float, float, float]:
    """Mean, cluster-robust standard error, and design effect."""
    value = float(scores.mean())
    if count < 2:
        return value, math.nan, 1.0
    residuals = scores - value
    sums = np.bincount(index, weights=residuals, minlength=count)
    variance = count / (count - 1) * float(sums @ sums) / scores.size**2
    independent = float(residuals @ residuals) / (scores.size - 1) / scores.size
    return value, math.sqrt(variance), variance / independent if independent > 0 else 1.0


def _wilson(value: float, num: float, quantile: float) -> tuple[float, float]:
    """Wilson's score interval of a proportion of ``num`` independent items; it holds ``value``.

    scipy has it for whole numbers of items and the normal quantile alone, not for effective numbers and Student's.
    """
    square = quantile**2 / num
    centre = (value + square / 2) / (1 + square)
    reach = quantile / (1 + square) * math.sqrt(value * (1 - value) / num + square / (4 * num))
    # At 0 and at 1 one bound is the value itself, up to rounding: a bar must not begin beyond its dot.
    return min(value, max(0.0, centre - reach)), max(value, min(1.0, centre + reach))


def _sign_flip(sums: np.ndarray, seed: int) -> float:
    if not sums.size:
        return 1.0
    observed = abs(sums.sum()) * (1 - 1e-9)  # sums in another order may differ in the last bit
    if sums.size <= ENUMERATED_CLUSTERS:
        patterns = np.arange(2**sums.size)[:, None] >> np.arange(sums.size) & 1
        return float((np.abs((2 * patterns - 1) @ sums) >= observed).mean())
    rng = np.random.default_rng(seed)
    reached, block = 0, 1000
    for _ in range(SIGN_DRAWS // block):
        signs = 2.0 * rng.integers(0, 2, (block, sums.size), dtype=np.int8) - 1.0
        reached += int((np.abs(signs @ sums) >= observed).sum())
    return (reached + 1) / (SIGN_DRAWS + 1)  # the pattern that was seen counts as one draw


def _reach(power: float, significance: float) -> float:
    if not 0 < power < 1 or not 0 < significance < 1:
        raise ValueError(f"power and significance must be in (0, 1), got {power} and {significance}")
    normal = require_scipy().norm
    return float(normal.ppf(power) + normal.ppf(1 - significance / 2))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")

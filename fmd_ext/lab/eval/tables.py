"""Tables of accuracy: a method in a group of items, with intervals and comparisons in pairs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fmd_ext.lab.eval import statistics
from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.statistics import Comparison, Estimate

Answers = Sequence[Sequence["str | None"]]  # per item per sample what was read; None: unread


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method in one group of items.

    Attributes:
        accuracy: share of right answers; unparsed ones count as wrong, unless the protocol leaves them out.
        unparsed: share of answers that are none.
        yes_no: of yes/no items precision, recall, f1 (of "yes") and yes_rate; empty for others.
        comparison: with the baseline on the same items; None for the baseline itself.
        adjusted_p: of the comparison, after Holm, over all groups and methods of its table.
    """

    accuracy: Estimate
    unparsed: float
    yes_no: dict[str, Estimate]
    comparison: Comparison | None = None
    adjusted_p: float | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """``rows``: group of items (a value of the category) to method to cell."""

    category: str
    rows: dict[str, dict[str, Cell]]


def scores_of(items: Sequence[Item], said: Answers, *, skips_unread: bool = False) -> np.ndarray:
    """float [items]: share of an item's samples that are right; nan where all were left out as unread."""
    scores = np.full(len(items), math.nan)
    for index, (item, answers) in enumerate(zip(items, said, strict=True)):
        counted = [answer for answer in answers if answer is not None or not skips_unread]
        if counted:
            scores[index] = sum(answer == item.answer for answer in counted) / len(counted)
    return scores


def groups_of(items: Sequence[Item], category: str) -> dict[str, np.ndarray]:
    """Indices of the items of each value, in the order in which the values come. An item can be in several groups."""
    found: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        for value in item.values(category):
            found.setdefault(value, []).append(index)
    return {value: np.array(members) for value, members in found.items()}


def table_of(
    category: str,
    items: Sequence[Item],
    said: Mapping[str, Answers],
    scores: Mapping[str, np.ndarray],
    groups: Mapping[str, np.ndarray],
    confidence: float,
) -> Table:
    """All methods in all groups; the first of ``said`` is the baseline.

    Args:
        category: that the groups are values of.
        said, scores: by method, of `scores_of`.
    """
    baseline = next(iter(said))
    rows: dict[str, dict[str, Cell]] = {}
    for value, members in groups.items():
        videos = np.array([items[index].video for index in members])
        rows[value] = {}
        for method in said:
            own, other = scores[method][members], scores[baseline][members]
            answers = [said[method][index] for index in members]
            both = np.isfinite(own) & np.isfinite(other)
            comparison = None
            if method != baseline and both.any():
                comparison = statistics.compare(own[both], other[both], videos[both], confidence=confidence)
            rows[value][method] = Cell(
                accuracy=accuracy_of(own, videos, confidence),
                unparsed=float(np.mean([[answer is None for answer in row] for row in answers])),
                yes_no=_yes_no([items[index] for index in members], answers, videos, confidence),
                comparison=comparison,
            )
    tested = [(value, method) for value in rows for method in rows[value] if rows[value][method].comparison]
    adjusted = statistics.holm([rows[value][method].comparison.p_value for value, method in tested])
    for (value, method), p in zip(tested, adjusted, strict=True):
        rows[value][method] = dataclasses.replace(rows[value][method], adjusted_p=p)
    return Table(category, rows)


def average_of(
    items: Sequence[Item], scores: np.ndarray, groups: Mapping[str, np.ndarray], confidence: float
) -> Estimate:
    """The mean over groups, each with the same weight."""
    columns = np.zeros((len(items), 2 * len(groups)))
    for number, members in enumerate(groups.values()):
        counted = members[np.isfinite(scores[members])]
        columns[counted, 2 * number] = scores[counted]
        columns[counted, 2 * number + 1] = 1

    def metric(sums: np.ndarray) -> np.ndarray:
        return (sums[..., 0::2] / sums[..., 1::2]).mean(-1)

    return statistics.bootstrap(metric, columns, [item.video for item in items], confidence=confidence)


def accuracy_of(scores: np.ndarray, videos: np.ndarray, confidence: float) -> Estimate:
    """The share of right answers with its interval, from scores [items] of `scores_of`; nan counts nowhere."""
    counted = np.isfinite(scores)
    scores, videos = scores[counted], videos[counted]
    if not scores.size:
        return Estimate(math.nan, math.nan, math.nan, math.nan, 0, 0)
    whole = np.isin(scores, (0.0, 1.0)).all()  # not where samples of an item differ
    return (statistics.proportion if whole else statistics.mean)(scores, videos, confidence=confidence)


def _yes_no(items: Sequence[Item], answers: Answers, videos: np.ndarray, confidence: float) -> dict[str, Estimate]:
    """Of "yes"; an unparsed answer is not "yes", so it lowers the recall and not the precision."""
    if any(item.kind != "yes-no" for item in items):
        return {}
    truth = np.array([[item.answer == "yes"] for item in items])
    yes = np.array([[answer == "yes" for answer in row] for row in answers])
    counts = [(truth & yes).sum(1), (~truth & yes).sum(1), (truth & ~yes).sum(1), np.full(len(yes), yes.shape[1])]
    metrics: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "precision": lambda s: s[..., 0] / (s[..., 0] + s[..., 1]),
        "recall": lambda s: s[..., 0] / (s[..., 0] + s[..., 2]),
        "f1": lambda s: 2 * s[..., 0] / (2 * s[..., 0] + s[..., 1] + s[..., 2]),
        "yes_rate": lambda s: (s[..., 0] + s[..., 1]) / s[..., 3],
    }
    return {
        name: statistics.bootstrap(metric, np.stack(counts, axis=1), videos, confidence=confidence, num_resamples=1000)
        for name, metric in metrics.items()
    }

"""From predictions to tables: accuracy per category with intervals, comparisons in pairs, power, speed.

Everything is computed from the raw answers, anew each time: no model is needed, and a better parser changes the scores
of old predictions. All methods are scored on the same items: those that every method has answered.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fmd_ext.lab.eval import statistics
from fmd_ext.lab.eval.benchmarks import BENCHMARKS
from fmd_ext.lab.eval.captions import caption_scores
from fmd_ext.lab.eval.counts import Counts, asked_items, count, is_answered
from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.predictions import Key, Prediction, Results, ResultsError, write_atomically
from fmd_ext.lab.eval.run import judged
from fmd_ext.lab.eval.statistics import Comparison, Estimate

GAINS = (0.01, 0.02, 0.05)  # for which the number of items is given that shows them
ALL = "all"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method in one group of items.

    Attributes:
        accuracy: share of right answers, unparsed ones counted as wrong.
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


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All that is known of a run.

    Attributes:
        settings: of the run, as recorded.
        methods: names, the baseline first.
        counts: what became of the questions.
        tables: the first one is about all items together.
        averages: category to method to mean over its groups.
        captions: method to metric to score; a text where it could not be computed.
        speed: method to its median times in the run, and their ratio to the baseline's.
        items_needed: gain to number of items that shows it with 80 % power, per method against the baseline.
        detectable: method to the gain that this run's items show with 80 % power.
        flips: method to ids of items that it gained and lost against the baseline.
    """

    settings: dict[str, Any]
    methods: list[str]
    counts: Counts
    tables: list[Table]
    averages: dict[str, dict[str, Estimate]]
    captions: dict[str, dict[str, float] | str]
    speed: dict[str, dict[str, float]]
    items_needed: dict[str, dict[str, int | None]]
    detectable: dict[str, float]
    flips: dict[str, dict[str, list[str]]]

    @property
    def baseline(self) -> str:
        return self.methods[0]

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values; what is not defined is null."""
        return _plain(dataclasses.asdict(self))


def evaluate(results: Results, *, baseline: str | None = None, confidence: float = 0.95) -> Evaluation:
    """Scores a results folder.

    Args:
        results: of a run; it may be unfinished.
        baseline: the method that others are compared with; None: vanilla where it was run, else the first.
        confidence: of all intervals.

    Raises ResultsError for a folder without predictions, or without items that every method answered.
    """
    settings, predictions = results.settings(), results.predictions()
    items = asked_items(results, predictions)
    methods = list(dict.fromkeys(key[0] for key in predictions))
    if not methods:
        raise ResultsError(f"{results.folder} holds no predictions yet")
    baseline = baseline or ("vanilla" if "vanilla" in methods else methods[0])
    if baseline not in methods:
        raise ResultsError(f"no method {baseline!r} in {results.folder}; there are {', '.join(methods)}")
    methods = [baseline, *(method for method in methods if method != baseline)]
    benchmark = BENCHMARKS[settings["benchmark"]]
    samples = range(1 + max(key[2] for key in predictions))

    answered = [item for item in items if is_answered(item, predictions, methods, samples)]
    counts = count(items, predictions, methods, samples, excluded=len(results.excluded()), settings=settings)
    if not answered:
        why = "".join(
            f"; {number} answers are missing: {reason}" for reason, number in list(counts.reasons.items())[:1]
        )
        raise ResultsError(f"no question in {results.folder} has been answered by all of {', '.join(methods)} yet{why}")
    common = [item for item in answered if item.kind != "caption"]
    captions = [item for item in answered if item.kind == "caption"]
    said = {
        method: [[judged(item, predictions[method, item.id, s].raw)[0] for s in samples] for item in common]
        for method in methods
    }
    scores = {method: _correct(common, rows, len(samples)) for method, rows in said.items()}
    tables, averages = [], {}
    if common:
        groups = {ALL: {ALL: np.arange(len(common))}}
        groups |= {name: _groups(common, name) for name in benchmark.tables}
        tables = [Table(name, _rows(common, said, scores, members, confidence)) for name, members in groups.items()]
        averages = {
            name: {method: _average(common, scores[method], groups[name], confidence) for method in methods}
            for name in benchmark.group_averages
            if len(groups.get(name, _groups(common, name))) > 1
        }
    overall = tables[0].rows[ALL] if tables else {}
    return Evaluation(
        settings=settings,
        methods=methods,
        counts=counts,
        tables=tables,
        averages=averages,
        captions=_captions(captions, predictions, methods, len(samples)),
        speed=_speed([*common, *captions], predictions, methods, len(samples)),
        items_needed={m: _needed(overall[m].comparison) for m in methods[1:] if overall},
        detectable={m: _detectable(overall[m].comparison) for m in methods[1:] if overall},
        flips={m: _flips(common, scores[m], scores[baseline]) for m in methods[1:]},
    )


def write_scores(results: Results, evaluation: Evaluation) -> None:
    """Writes ``scores.json`` and ``predictions.jsonl``: one line per answer in the benchmark's order, scored anew.

    The times are left out there (they are in ``shares/``), so that equal runs give equal files.
    """
    write_atomically(results.folder / "scores.json", json.dumps(evaluation.as_json(), indent=1))
    items, predictions = results.items(), results.predictions()
    order = {item.id: number for number, item in enumerate(items)}
    by_id = {item.id: item for item in items}
    lines = []
    for prediction in sorted(predictions.values(), key=lambda p: (p.method, order[p.item], p.sample)):
        item = by_id[prediction.item]
        names = ("method", "item", "sample", "prompt", "raw", "tokens", "error", "shown", "notes")
        row = {name: getattr(prediction, name) for name in names} | {"answer": item.answer}
        row["parsed"], row["score"] = (None, None) if prediction.error else judged(item, prediction.raw)
        lines.append(json.dumps(row, ensure_ascii=False))
    write_atomically(results.folder / "predictions.jsonl", "\n".join([*lines, ""]))


def _correct(items: list[Item], said: list[list[str | None]], samples: int) -> np.ndarray:
    """float [items, samples]: 1 where the answer is right."""
    right = [parsed == item.answer for item, row in zip(items, said, strict=True) for parsed in row]
    return np.array(right, dtype=float).reshape(len(items), samples)


def _groups(items: Sequence[Item], category: str) -> dict[str, np.ndarray]:
    """Indices of the items of each value, in the order in which the values come."""
    found: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        if category in item.categories:
            found.setdefault(item.categories[category], []).append(index)
    return {value: np.array(members) for value, members in found.items()}


def _rows(
    items: list[Item],
    said: dict[str, list[list[str | None]]],
    scores: dict[str, np.ndarray],
    groups: dict[str, np.ndarray],
    confidence: float,
) -> dict[str, dict[str, Cell]]:
    baseline = next(iter(said))
    rows: dict[str, dict[str, Cell]] = {}
    for value, members in groups.items():
        videos = [items[index].video for index in members]
        rows[value] = {}
        for method in said:
            correct = scores[method][members]
            single = correct.shape[1] == 1
            accuracy = (statistics.proportion if single else statistics.mean)(
                correct.mean(1), videos, confidence=confidence
            )
            answers = [said[method][index] for index in members]
            comparison = None
            if method != baseline:
                other = scores[baseline][members].mean(1)
                comparison = statistics.compare(correct.mean(1), other, videos, confidence=confidence)
            rows[value][method] = Cell(
                accuracy=accuracy,
                unparsed=float(np.mean([[answer is None for answer in row] for row in answers])),
                yes_no=_yes_no([items[index] for index in members], answers, videos, confidence),
                comparison=comparison,
            )
    tested = [(value, method) for value in rows for method in rows[value] if rows[value][method].comparison]
    adjusted = statistics.holm([rows[value][method].comparison.p_value for value, method in tested])
    for (value, method), p in zip(tested, adjusted, strict=True):
        rows[value][method] = dataclasses.replace(rows[value][method], adjusted_p=p)
    return rows


def _yes_no(
    items: list[Item], answers: list[list[str | None]], videos: list[str], confidence: float
) -> dict[str, Estimate]:
    """Of "yes"; an unparsed answer is not "yes", so it lowers the recall and not the precision."""
    if any(item.kind != "yes-no" for item in items):
        return {}
    truth = np.array([[item.answer == "yes"] for item in items])
    yes = np.array([[answer == "yes" for answer in row] for row in answers])
    counts = [(truth & yes).sum(1), (~truth & yes).sum(1), (truth & ~yes).sum(1), np.full(len(yes), yes.shape[1])]
    metrics = {
        "precision": lambda s: s[..., 0] / (s[..., 0] + s[..., 1]),
        "recall": lambda s: s[..., 0] / (s[..., 0] + s[..., 2]),
        "f1": lambda s: 2 * s[..., 0] / (2 * s[..., 0] + s[..., 1] + s[..., 2]),
        "yes_rate": lambda s: (s[..., 0] + s[..., 1]) / s[..., 3],
    }
    return {
        name: statistics.bootstrap(metric, np.stack(counts, axis=1), videos, confidence=confidence, num_resamples=1000)
        for name, metric in metrics.items()
    }


def _average(items: list[Item], scores: np.ndarray, groups: dict[str, np.ndarray], confidence: float) -> Estimate:
    """The mean over groups, each with the same weight."""
    columns = np.zeros((len(items), 2 * len(groups)))
    for number, members in enumerate(groups.values()):
        columns[members, 2 * number] = scores[members].mean(1)
        columns[members, 2 * number + 1] = 1

    def metric(sums: np.ndarray) -> np.ndarray:
        return (sums[..., 0::2] / sums[..., 1::2]).mean(-1)

    return statistics.bootstrap(metric, columns, [item.video for item in items], confidence=confidence)


def _speed(
    items: list[Item], predictions: dict[Key, Prediction], methods: list[str], samples: int
) -> dict[str, dict[str, float]]:
    """Medians over answers, and medians of the ratios to the baseline's answer to the same item."""

    def times(method: str) -> np.ndarray:
        rows = [predictions[method, item.id, sample] for item in items for sample in range(samples)]
        return np.array([(p.first_token_s, p.seconds, p.seconds / p.batch, p.tokens) for p in rows])

    reference = times(methods[0])
    speed: dict[str, dict[str, float]] = {}
    for method in methods:
        own = times(method)
        speed[method] = {
            "first_token_s": float(np.median(own[:, 0])),
            "first_token_ratio": float(np.median(own[:, 0] / reference[:, 0])),
            "seconds_per_answer": float(np.median(own[:, 2])),
            "tokens_per_answer": float(own[:, 3].mean()),
        }
    return speed


def _captions(
    items: list[Item], predictions: dict[Key, Prediction], methods: list[str], samples: int
) -> dict[str, dict[str, float] | str]:
    if not items:
        return {}
    references = [item.answer for item in items for _ in range(samples)]
    return {
        method: caption_scores(references, [predictions[method, i.id, s].raw for i in items for s in range(samples)])
        for method in methods
    }


def _needed(comparison: Comparison) -> dict[str, int | None]:
    """An effect that exceeds what ever differs between the methods cannot be had: None."""
    effect = max(1.0, comparison.difference.design_effect)  # below 1 may be chance
    return {
        f"{gain:g}": statistics.items_needed(gain, comparison.discordance, design_effect=effect)
        if gain <= comparison.discordance
        else None
        for gain in GAINS
    }


def _detectable(comparison: Comparison) -> float:
    estimate = comparison.difference
    effect = max(1.0, estimate.design_effect)
    return statistics.detectable_gain(estimate.num_items, comparison.discordance, design_effect=effect)


def _flips(items: list[Item], scores: np.ndarray, baseline: np.ndarray) -> dict[str, list[str]]:
    change = scores.mean(1) - baseline.mean(1)
    return {
        "gained": [item.id for item, difference in zip(items, change, strict=True) if difference > 0],
        "lost": [item.id for item, difference in zip(items, change, strict=True) if difference < 0],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

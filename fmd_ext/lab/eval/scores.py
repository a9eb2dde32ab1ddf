"""From predictions to tables: accuracy per category with intervals, comparisons in pairs, power, speed.

Everything is computed from the raw answers, anew each time: no model is needed, and a better parser changes the scores
of old predictions. All methods are scored on the same items: those that every method has answered.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fmd_ext.lab.eval import statistics
from fmd_ext.lab.eval.benchmarks import BENCHMARKS, Benchmark
from fmd_ext.lab.eval.captions import caption_scores
from fmd_ext.lab.eval.counts import Counts, asked_items, count, is_answered
from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.parsing import parse_answer
from fmd_ext.lab.eval.predictions import Key, Prediction, Results, ResultsError, write_atomically
from fmd_ext.lab.eval.run import judged
from fmd_ext.lab.eval.statistics import Comparison, Estimate
from fmd_ext.lab.eval.tables import Answers, Table, accuracy_of, average_of, groups_of, scores_of, table_of

GAINS = (0.01, 0.02, 0.05)  # for which the number of items is given that shows them
ALL = "all"
PROTOCOLS = ("ours", "official")


@dataclasses.dataclass(frozen=True)
class CaptionCell:
    """One metric of one method's captions.

    Attributes:
        corpus: the score of all captions together, as papers give it.
        mean: of the captions' own scores, with its interval.
        comparison: of the captions' own scores with the baseline's; None for the baseline itself.
        adjusted_p: of the comparison, after Holm, over all methods.
    """

    corpus: float
    mean: Estimate
    comparison: Comparison | None = None
    adjusted_p: float | None = None


@dataclasses.dataclass(frozen=True)
class Reread:
    """One method's answers as the other protocol reads them.

    Attributes:
        accuracy: over all questions.
        otherwise: answers in which the protocols read different things.
    """

    accuracy: Estimate
    otherwise: int


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All that is known of a run.

    Attributes:
        settings: of the run, as recorded.
        protocol: how answers were read, one of `PROTOCOLS`.
        reread: method to what the other one makes of its answers; empty where the benchmark has no script of its own.
        methods: names, the baseline first.
        counts: what became of the questions.
        tables: the first one is about all items together.
        averages: category to method to mean over its groups.
        captions: method to metric to its cell; a text where it could not be computed.
        speed: timed method to its median times in the run, and their ratio to the baseline's.
        items_needed: gain to number of items that shows it with 80 % power, per method against the baseline.
        detectable: method to the gain that this run's items show with 80 % power.
        flips: method to ids of items that it gained and lost against the baseline.
    """

    settings: dict[str, Any]
    protocol: str
    reread: dict[str, Reread]
    methods: list[str]
    counts: Counts
    tables: list[Table]
    averages: dict[str, dict[str, Estimate]]
    captions: dict[str, dict[str, CaptionCell] | str]
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


def evaluate(
    results: Results, *, baseline: str | None = None, confidence: float = 0.95, protocol: str = "ours"
) -> Evaluation:
    """Scores a results folder.

    Args:
        results: of a run; it may be unfinished.
        baseline: the method that others are compared with; None: vanilla where it was run, else the first.
        confidence: of all intervals.
        protocol: how answers are read, one of `PROTOCOLS`: as a person reads them, or as the benchmark's own script
            does, with its faults.

    Raises ResultsError for a folder without predictions, or without items that every method answered, and for a
    benchmark without a script of its own.
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
    _, skips_unread = reading_of(benchmark, protocol)
    samples = range(1 + max(key[2] for key in predictions))

    answered = [item for item in items if is_answered(item, predictions, methods, samples)]
    counts = count(items, predictions, methods, samples, left_out=results.left_out(), settings=settings)
    if not answered:
        why = "".join(
            f"; {number} answers are missing: {reason}" for reason, number in list(counts.reasons.items())[:1]
        )
        raise ResultsError(f"no question in {results.folder} has been answered by all of {', '.join(methods)} yet{why}")
    common = [item for item in answered if item.kind != "caption"]
    captions = [item for item in answered if item.kind == "caption"]

    def read_by(protocol: str) -> dict[str, list[list[str | None]]]:
        known, read = results.readings(protocol), reading_of(benchmark, protocol)[0]

        def answer(key: Key, item: Item) -> str | None:
            return known[key] if key in known else judged(item, predictions[key].raw, read)[0]

        return {m: [[answer((m, item.id, s), item) for s in samples] for item in common] for m in methods}

    said = read_by(protocol)
    scores = {method: scores_of(common, rows, skips_unread=skips_unread) for method, rows in said.items()}
    tables, averages = [], {}
    if common:
        groups = {ALL: {ALL: np.arange(len(common))}}
        groups |= {name: groups_of(common, name) for name in benchmark.tables}
        tables = [table_of(name, common, said, scores, members, confidence) for name, members in groups.items()]
        averages = {
            name: {method: average_of(common, scores[method], groups[name], confidence) for method in methods}
            for name in benchmark.group_averages
            if len(groups.get(name, groups_of(common, name))) > 1
        }
    overall = tables[0].rows[ALL] if tables else {}
    other = next((name for name in PROTOCOLS if name != protocol), None) if common and benchmark.official else None
    return Evaluation(
        settings=settings,
        protocol=protocol,
        reread=_reread(common, said, read_by(other), reading_of(benchmark, other)[1], confidence) if other else {},
        methods=methods,
        counts=counts,
        tables=tables,
        averages=averages,
        captions=_captions(captions, predictions, methods, len(samples), confidence),
        speed=_speed([*common, *captions], predictions, methods, len(samples)),
        items_needed={m: _needed(overall[m].comparison) for m in methods[1:] if overall and overall[m].comparison},
        detectable={m: _detectable(overall[m].comparison) for m in methods[1:] if overall and overall[m].comparison},
        flips={m: _flips(common, scores[m], scores[baseline]) for m in methods[1:]},
    )


def _reread(
    items: list[Item],
    said: Mapping[str, Answers],
    otherwise: Mapping[str, Answers],
    skips_unread: bool,
    confidence: float,
) -> dict[str, Reread]:
    videos = np.array([item.video for item in items])
    found = {}
    for method, answers in otherwise.items():
        changed = sum(
            a != b for own, other in zip(said[method], answers, strict=True) for a, b in zip(own, other, strict=True)
        )
        scores = scores_of(items, answers, skips_unread=skips_unread)
        found[method] = Reread(accuracy_of(scores, videos, confidence), changed)
    return found


def reading_of(benchmark: Benchmark, protocol: str) -> tuple[Callable[[Item, str], str | None], bool]:
    """How a protocol reads answers, and whether it leaves unread ones out. Raises ResultsError where it has no way."""
    if protocol == "ours":
        return parse_answer, False
    if protocol not in PROTOCOLS:
        raise ResultsError(f"unknown protocol {protocol!r}; the protocols are {', '.join(PROTOCOLS)}")
    if benchmark.official is None:
        known = ", ".join(name for name, other in BENCHMARKS.items() if other.official)
        raise ResultsError(
            f"{benchmark.title} has no script of its own that reads text, so no official protocol; {known} have one"
        )
    return benchmark.official.read, benchmark.official.skips_unread


def write_scores(results: Results, evaluation: Evaluation) -> None:
    """Writes ``scores.json`` and ``predictions.jsonl``: one line per answer in the benchmark's order, scored anew.

    The times are left out there (they are in ``shares/``), so that equal runs give equal files.
    """
    write_atomically(results.folder / "scores.json", json.dumps(evaluation.as_json(), indent=1))
    read, _ = reading_of(BENCHMARKS[evaluation.settings["benchmark"]], evaluation.protocol)
    items, predictions = results.items(), results.predictions()
    order = {item.id: number for number, item in enumerate(items)}
    by_id = {item.id: item for item in items}
    lines = []
    for prediction in sorted(predictions.values(), key=lambda p: (p.method, order[p.item], p.sample)):
        item = by_id[prediction.item]
        names = ("method", "item", "sample", "prompt", "raw", "tokens", "error", "shown", "notes")
        row = {name: getattr(prediction, name) for name in names} | {"answer": item.answer}
        row["parsed"], row["score"] = (None, None) if prediction.error else judged(item, prediction.raw, read)
        lines.append(json.dumps(row, ensure_ascii=False))
    write_atomically(results.folder / "predictions.jsonl", "\n".join([*lines, ""]))


def _speed(
    items: list[Item], predictions: dict[Key, Prediction], methods: list[str], samples: int
) -> dict[str, dict[str, float]]:
    """Medians over answers, and medians of the ratios to the baseline's answer to the same item; nan where the baseline
    was not timed. Answers made elsewhere have no times, and their methods are left out."""

    def times(method: str) -> np.ndarray:
        rows = [predictions[method, item.id, sample] for item in items for sample in range(samples)]
        return np.array([(p.first_token_s, p.seconds, p.seconds / p.batch, p.tokens) for p in rows])

    reference = times(methods[0])
    speed: dict[str, dict[str, float]] = {}
    for method in methods:
        own = times(method)
        if not own[:, 1].any():
            continue
        timed = reference[:, 0] > 0
        speed[method] = {
            "first_token_s": float(np.median(own[:, 0])),
            "first_token_ratio": float(np.median(own[timed, 0] / reference[timed, 0])) if timed.any() else math.nan,
            "seconds_per_answer": float(np.median(own[:, 2])),
            "tokens_per_answer": float(own[:, 3].mean()),
        }
    return speed


def _captions(
    items: list[Item], predictions: dict[Key, Prediction], methods: list[str], samples: int, confidence: float
) -> dict[str, dict[str, CaptionCell] | str]:
    if not items:
        return {}
    references = [item.answer for item in items for _ in range(samples)]
    found = {
        method: caption_scores(references, [predictions[method, i.id, s].raw for i in items for s in range(samples)])
        for method in methods
    }
    if why := next((scores for scores in found.values() if isinstance(scores, str)), None):
        return dict.fromkeys(methods, why)
    videos = [item.video for item in items]
    cells: dict[str, dict[str, CaptionCell]] = {method: {} for method in methods}
    for metric in found[methods[0]].corpus:
        own = {method: scores.items[metric].reshape(len(items), samples).mean(1) for method, scores in found.items()}
        comparisons = [
            statistics.compare(own[method], own[methods[0]], videos, confidence=confidence) for method in methods[1:]
        ]
        adjusted = statistics.holm([comparison.p_value for comparison in comparisons])
        for method, comparison, p in zip(methods, [None, *comparisons], [None, *adjusted], strict=True):
            mean = statistics.mean(own[method], videos, confidence=confidence)
            cells[method][metric] = CaptionCell(found[method].corpus[metric], mean, comparison, p)
    return cells


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
    change = scores - baseline
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

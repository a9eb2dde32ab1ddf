"""What became of the questions: asked, answered, failed, left out; and what was lost on the way to the model."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.predictions import Key, Prediction, Results


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of questions.

    Attributes:
        asked: that the run is about.
        answered: of these by every method; what the tables are about.
        captions: of the answered those that are scored as captions.
        failed: of these those that some method could not answer.
        unfinished: of these those that some method was not asked yet.
        excluded: left out by hand.
        calibration_left_out, calibration_kept: about videos that the settings were calibrated on.
        malformed, missing_videos: records and videos that the run did without.
        reasons: why answers are missing, the most frequent first, to the number of answers.
        notes: kind of note to method to number of answers, of those that there are.
    """

    asked: int
    answered: int
    captions: int
    failed: int
    unfinished: int
    excluded: int
    calibration_left_out: int
    calibration_kept: int
    malformed: int
    missing_videos: int
    reasons: Mapping[str, int]
    notes: Mapping[str, Mapping[str, int]]

    def lines(self, most: int = 8) -> list[str]:
        """For people, one line each; at most so many reasons."""
        first = f"{self.answered} of {self.asked} questions answered by every method"
        first += f" ({self.captions} of them captions)" * bool(self.captions)
        rest = [f"{self.failed} failed"] * bool(self.failed) + [f"{self.unfinished} not asked yet"] * bool(
            self.unfinished
        )
        lines = [", ".join([first, *rest])]
        left_out = {
            "excluded by hand": self.excluded,
            "about videos of the calibration": self.calibration_left_out,
            "malformed records": self.malformed,
            "missing videos": self.missing_videos,
        }
        if any(left_out.values()):
            lines.append("left out: " + ", ".join(f"{count} {name}" for name, count in left_out.items() if count))
        if self.calibration_kept:
            lines.append(
                f"{self.calibration_kept} questions are about videos that the settings were calibrated on: their "
                "accuracy says less than it seems to"
            )
        reasons = list(self.reasons.items())
        lines += [f"{count} answers are missing: {reason}" for reason, count in reasons[:most]]
        if len(reasons) > most:
            lines.append(
                f"{sum(count for _, count in reasons[most:])} more are missing for {len(reasons) - most} reasons"
            )
        return lines


def asked_items(results: Results, predictions: Mapping[Key, Prediction]) -> list[Item]:
    """The items that the folder's runs are about: as recorded, else those with predictions."""
    ids = results.asked()
    if ids is None:
        ids = {key[1] for key in predictions}
    return [item for item in results.items() if item.id in ids]


def count(
    items: Sequence[Item],
    predictions: Mapping[Key, Prediction],
    methods: Sequence[str],
    samples: Iterable[int],
    *,
    left_out: tuple[Sequence[str], Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> Counts:
    """Counts over ``items`` that are asked. ``left_out``: of `Results.left_out`; ``settings``: of the run."""
    excluded, calibration = left_out
    samples = list(samples)
    ids = {item.id for item in items}
    states = collections.Counter(_state(item, predictions, methods, samples) for item in items)
    reasons: collections.Counter[str] = collections.Counter()
    notes: dict[str, dict[str, int]] = {}
    for prediction in predictions.values():
        if prediction.item not in ids or prediction.method not in methods:
            continue
        if prediction.error is not None:
            reasons[prediction.error] += 1
        for kind in prediction.notes:
            by_method = notes.setdefault(kind, dict.fromkeys(methods, 0))
            by_method[prediction.method] += 1
    without = settings.get("about", {}).get("excluded", {})
    return Counts(
        asked=len(items),
        answered=states["answered"],
        captions=sum(item.kind == "caption" and is_answered(item, predictions, methods, samples) for item in items),
        failed=states["failed"],
        unfinished=states["unfinished"],
        excluded=len(excluded),
        calibration_left_out=0 if calibration.get("kept") else len(calibration.get("questions", ())),
        calibration_kept=len(calibration.get("questions", ())) if calibration.get("kept") else 0,
        malformed=without.get("malformed", 0),
        missing_videos=without.get("missing_videos", 0),
        reasons=dict(reasons.most_common()),
        notes=dict(sorted(notes.items())),
    )


def is_answered(
    item: Item, predictions: Mapping[Key, Prediction], methods: Sequence[str], samples: Iterable[int]
) -> bool:
    """Whether every method has answered every sample."""
    return _state(item, predictions, methods, samples) == "answered"


def _state(item: Item, predictions: Mapping[Key, Prediction], methods: Sequence[str], samples: Iterable[int]) -> str:
    found = [predictions.get((method, item.id, sample)) for method in methods for sample in samples]
    if any(prediction is not None and prediction.error is not None for prediction in found):
        return "failed"
    return "unfinished" if None in found else "answered"

"""What a benchmark asks: one item per question, with everything that scoring needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

KINDS = ("yes-no", "choice", "word", "caption")
SENSES = ("both", "picture", "sound")


@dataclasses.dataclass(frozen=True)
class Item:
    """One question about one video.

    Args:
        id: unique within its benchmark, and the same whenever the same files are read.
        video: name of the video. Items of one video are one cluster in the statistics.
        path: the media file; None where it is missing.
        question: as published, placeholders filled in.
        kind: ``"yes-no"``, ``"choice"`` (answer: a letter), ``"word"`` (answer: one of ``options``) or ``"caption"``.
        answer: the right one, normalised as `parsing` normalises what a model says; of a caption the reference.
        options: texts of the choices in the order of their letters; of a ``word`` item all answers there are.
        categories: for the tables, such as ``{"task": "AV Matching"}``; several values where it counts under each.
        prompt: what the model is asked, filled in by `benchmarks.load`.
        subtitles: of the video, where they are asked for.
        sound: the file with the sound, where it is not the one of ``path``.
        senses: what of the files the model is given, one of SENSES.
    """

    id: str
    video: str
    path: Path | None
    question: str
    kind: str
    answer: str
    options: tuple[str, ...] = ()
    categories: Mapping[str, str | Sequence[str]] = dataclasses.field(default_factory=dict)
    prompt: str = ""
    subtitles: str = ""
    sound: Path | None = None
    senses: str = "both"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.senses not in SENSES:
            raise ValueError(f"senses must be one of {', '.join(SENSES)}, got {self.senses!r}")

    def values(self, category: str) -> tuple[str, ...]:
        """The item's values of a category; none where it has no such category."""
        found = self.categories.get(category, ())
        return (found,) if isinstance(found, str) else tuple(found)

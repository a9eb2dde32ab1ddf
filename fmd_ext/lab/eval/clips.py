"""Clips and prompts as the model gets them, and a note of whatever is lost on the way."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fmd_ext.inputs.chat import load_clip_for, prepare_batch
from fmd_ext.inputs.media import Clip, MediaError
from fmd_ext.lab.eval.items import Item

# Kinds of notes: about the clip, and about the answer.
NO_SOUND, NO_PICTURE, DAMAGED = "clip without sound", "clip without picture", "damaged clip"
SOUND_CUT, LOWERED, OTHER = "sound cut", "frame rate lowered", "other warning"
CUT_OFF, NON_FINITE = "answer cut off", "non-finite logits"

_HEARD = re.compile(r"hears only the first ([\d.]+) s of ([\d.]+) s of sound")  # the warning of fmd_ext.inputs, models
_KEPT = 4  # clips: questions about a video follow each other


@dataclasses.dataclass(frozen=True)
class Reading:
    """How clips are read and shown to the model, as for ``fmd-ext ask``."""

    fps: float = 2.0
    max_frames: int = 128
    frame_pixels: tuple[int, int] | None = None
    interleaved: bool = False


@dataclasses.dataclass(frozen=True)
class Shown:
    """A clip as read. ``seconds``: ``frames``, ``picture_s``, ``sound_s``; ``notes``: kind to detail."""

    clip: Clip
    seconds: dict[str, float]
    notes: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Group:
    """Items that share a call.

    Attributes:
        items: in the order of the inputs' rows.
        inputs: of ``generate``, not yet on the model's device; None where nothing can be asked.
        error: why not.
        shown, notes: per item, as in `predictions.Prediction`.
    """

    items: list[Item]
    inputs: dict[str, Any] | None
    error: str | None = None
    shown: tuple[dict[str, float], ...] = ()
    notes: tuple[dict[str, str], ...] = ()


class ClipInputs:
    """Reads clips and makes the inputs of a batch. No item's failure is another's: it becomes the reason of its group.

    Args:
        processor: of the model.
        reading: how clips are read.
        refuse: from the length of the prompts and the items why they cannot be asked, None where they can.
    """

    def __init__(
        self, processor: Any, reading: Reading, refuse: Callable[[int, Sequence[Item]], str | None] = lambda *_: None
    ) -> None:
        self.processor, self.reading, self.refuse = processor, reading, refuse
        self._kept: collections.OrderedDict[tuple[Any, ...], Shown | str] = collections.OrderedDict()
        self._reading = threading.Lock()  # one thread reads ahead, another reads a question of a failed batch again

    def read(self, batch: Sequence[Item]) -> list[Shown | str]:
        """The clips, or why they cannot be read."""
        with self._reading:
            return [self._read(item) for item in batch]

    def prepare(self, batch: Sequence[Item], clips: Sequence[Shown | str] | None = None) -> list[Group]:
        """The inputs of a batch, in groups that can share a call; last the items that cannot be asked."""
        together: dict[Any, list[tuple[Item, Shown]]] = collections.defaultdict(list)
        refused: list[Group] = []
        for item, shown in zip(batch, self.read(batch) if clips is None else clips, strict=True):
            if isinstance(shown, str):
                refused.append(Group([item], None, shown))
            else:
                # One call takes one frame rate; interleaving needs picture and sound in every clip.
                clip = shown.clip
                together[clip.fps if clip.frames is not None else None, clip.missing].append((item, shown))
        return [*(group for rows in together.values() for group in self._groups(rows)), *refused]

    def _groups(self, rows: list[tuple[Item, Shown]]) -> list[Group]:
        items = [item for item, _ in rows]
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                inputs = _tried(lambda: self._inputs(rows)) if len(rows) == 1 else self._inputs(rows)
        except Exception as error:
            if len(rows) > 1:
                return [group for row in rows for group in self._groups([row])]
            return [Group(items, None, reason_of(error), (rows[0][1].seconds,), (rows[0][1].notes,))]
        told = [str(w.message) for w in caught if not issubclass(w.category, (DeprecationWarning, FutureWarning))]
        described = [_described(shown, told) for _, shown in rows]
        error = self.refuse(inputs["input_ids"].shape[1], items)
        return [
            Group(
                items,
                inputs if error is None else None,
                error,
                tuple(seconds for seconds, _ in described),
                tuple(notes for _, notes in described),
            )
        ]

    def _inputs(self, rows: list[tuple[Item, Shown]]) -> dict[str, Any]:
        return prepare_batch(
            self.processor,
            [([shown.clip], item.prompt) for item, shown in rows],
            use_audio_in_video=self.reading.interleaved,
            frame_pixels=self.reading.frame_pixels,
        )

    def _read(self, item: Item) -> Shown | str:
        path, key = item.path, (item.path, item.sound, item.senses)
        if path is None:
            return "the video is missing"
        if key not in self._kept:
            try:
                with _log_of_this_thread() as told:
                    clip = _tried(lambda: self._clip(item), free=self._kept.clear)
                self._kept[key] = self._shown(clip, [message.removeprefix(f"{path} ") for message in told])
            except Exception as error:
                self._kept[key] = reason_of(error)
        self._kept.move_to_end(key)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return self._kept[key]

    def _clip(self, item: Item) -> Clip:
        rates = {"fps": self.reading.fps, "max_frames": self.reading.max_frames}
        return clip_of(item, lambda path: load_clip_for(self.processor, path, progress=False, **rates))

    def _shown(self, clip: Clip, told: list[str]) -> Shown:
        frames = 0 if clip.frames is None else len(clip.frames)
        seconds = {
            "frames": frames,
            "picture_s": round(min(frames / clip.fps, clip.duration_s), 3) if frames else 0.0,
            "sound_s": 0.0 if clip.audio is None else round(clip.audio.size / clip.sampling_rate, 3),
        }
        notes = {DAMAGED: "; ".join(told)} if told else {}
        if clip.missing:
            notes[NO_SOUND if clip.missing == "audio" else NO_PICTURE] = ""
        picks_itself = getattr(self.processor, "clip_arguments", {}).keys() & {"num_frames", "edge_seconds", "pick"}
        if frames and not picks_itself and clip.fps < 0.999 * self.reading.fps:
            notes[LOWERED] = f"{clip.fps:.3g} instead of {self.reading.fps:g} frames per second"
        return Shown(clip, seconds, notes)


def clip_of(item: Item, read: Callable[[Path], Clip]) -> Clip:
    """What the item's files, as ``read`` reads them, hold of the senses that it is asked with.

    Raises MediaError where the one sense that is asked about is not there.
    """
    clip = read(item.path)
    if item.sound is not None:
        heard = read(item.sound)
        clip = dataclasses.replace(clip, audio=heard.audio, sampling_rate=heard.sampling_rate)
    if item.senses == "both":
        return clip
    lacking, given = ("audio", clip.frames) if item.senses == "picture" else ("frames", clip.audio)
    if given is None:
        raise MediaError(f"{item.path} has no {item.senses}, and the question is about it alone")
    return dataclasses.replace(clip, **{lacking: None})


def _described(shown: Shown, told: list[str]) -> tuple[dict[str, float], dict[str, str]]:
    """What the model got of a clip and the notes, with the warnings of a call that are about this clip."""
    seconds, notes = dict(shown.seconds), dict(shown.notes)
    for message in dict.fromkeys(told):
        heard = _HEARD.search(message)
        if heard is None:
            notes[OTHER] = "; ".join(filter(None, (notes.get(OTHER), message)))
        elif f"{seconds['sound_s']:.1f}" == heard[2]:  # a warning does not name its clip, but how long it is
            seconds["sound_s"] = float(heard[1])
            notes[SOUND_CUT] = f"{heard[1]} s of {heard[2]} s"
    return seconds, notes


def reason_of(error: Exception) -> str:
    """One line. The kind of error goes before what a library says; our own messages stand for themselves."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, (MediaError, OSError)) and lines:
        return lines[0]
    return ": ".join([type(error).__name__, *lines[:1]])


def is_out_of_memory(error: Exception) -> bool:
    """torch has a class for a GPU's memory, and a message for a CPU's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("out of memory", "can't allocate memory")
    )


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _tried(function: Callable[[], Any], *, free: Callable[[], None] = lambda: None) -> Any:
    """What the function gives; where it runs out of memory, once more with the memory freed."""
    try:
        return function()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    free()  # behind the except clause: within it the error holds on to what was read
    free_memory()
    return function()


@contextlib.contextmanager
def _log_of_this_thread() -> Iterator[list[str]]:
    """What this package logs as a warning within the context, by this thread: another may be at work."""
    told: list[str] = []
    thread = threading.get_ident()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == thread:
                told.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logger = logging.getLogger("fmd_ext")
    logger.addHandler(listener)
    try:
        yield told
    finally:
        logger.removeHandler(listener)

"""Puts a benchmark's questions to a model by several methods; resumes, and shares the work among processes.

The batches follow from the chosen items alone, and never from what is done already or from the number of processes.
So an interrupted run that is resumed, or one that is shared, answers every question within the same batch as an
unbroken one, and gives the same predictions.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fmd_ext.inputs.chat import load_clip_for, prepare_batch, to_device
from fmd_ext.inputs.media import Clip, MediaError, clip_seconds
from fmd_ext.lab.eval.generation import Decoding, answer, max_new_tokens_for
from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.methods import Choice
from fmd_ext.lab.eval.parsing import parse_answer
from fmd_ext.lab.eval.predictions import Key, Locked, Prediction, Results, Share


@dataclasses.dataclass(frozen=True)
class Reading:
    """How clips are read and shown to the model, as for ``fmd-ext ask``."""

    fps: float = 2.0
    max_frames: int = 128
    frame_pixels: tuple[int, int] | None = None
    interleaved: bool = False


def rank_and_size() -> tuple[int, int]:
    """This process's place among those that torchrun, accelerate or the user started: RANK and WORLD_SIZE."""
    try:
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError as error:
        raise ValueError(f"RANK and WORLD_SIZE must be whole numbers: {error}") from None
    if not 0 <= rank < size:
        raise ValueError(f"need 0 <= RANK < WORLD_SIZE, got {rank} and {size}")
    return rank, size


def make_batches(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Batches of ``size`` items of about the same length, longest first; with size 1 in the given order.

    The length of a prompt is nearly that of its clip, so it is the clip's duration that is compared; questions about
    one video stay together. A file whose duration cannot be read counts as 0.
    """
    if size < 1:
        raise ValueError(f"the batch size must be 1 or more, got {size}")
    if size == 1:
        return [[item] for item in items]
    seconds = {item.video: clip_seconds(item.path) for item in items}
    kinds = {"caption": 1}  # longer answers in batches of their own
    order = sorted(items, key=lambda item: (kinds.get(item.kind, 0), -seconds[item.video], item.video, item.id))
    groups: dict[int, list[Item]] = collections.defaultdict(list)
    for item in order:
        groups[kinds.get(item.kind, 0)].append(item)
    return [group[at : at + size] for group in groups.values() for at in range(0, len(group), size)]


class Runner:
    """Answers items by several methods and writes the predictions.

    Args:
        model, processor: as loaded; the model is unpatched.
        choices: the methods.
        results: where predictions go; `Results.begin` has been called.
        limits: tokens that an answer may have, by kind of item.
        context_limit: positions that the model was made for; None: unknown.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        choices: Sequence[Choice],
        results: Results,
        *,
        limits: dict[str, int],
        decoding: Decoding,
        reading: Reading,
        context_limit: int | None = None,
    ) -> None:
        self.model, self.processor, self.choices, self.results = model, processor, list(choices), results
        self.limits, self.decoding, self.reading, self.context_limit = dict(limits), decoding, reading, context_limit
        self._clips: collections.OrderedDict[Path, Clip | str] = collections.OrderedDict()

    def run(self, items: Sequence[Item], *, batch_size: int = 1, rank: int = 0, size: int = 1, progress: bool = True):
        """Answers what is not answered yet.

        Batches are dealt to ``size`` shares; this process begins with share ``rank``, goes on with shares that nobody
        works on, such as that of a process that was killed, and returns when all shares are done. Raises Locked when
        processes of another number are at work in the folder.
        """
        self.results.refuse_others(size)
        batches = make_batches(items, batch_size)
        total = len(items) * len(self.choices) * self.decoding.samples
        with tqdm(
            total=total if size == 1 else -(-total // size),
            desc="answering" if size == 1 else f"answering ({rank + 1} of {size})",
            unit="answer",
            position=rank,
            disable=not progress,
            smoothing=0.05,
        ) as bar:
            # First what is free; then, holding nothing, wait for the others: all is answered at the end, by whomever.
            left = [*range(rank, size), *range(rank)]
            for index, wait in [*((index, False) for index in left), *((index, True) for index in left)]:
                if index not in left:
                    continue
                try:
                    share = Share(self.results.share_path(index, size), wait=wait)
                except Locked:
                    if size == 1:
                        raise
                    continue  # its own process is at work
                left.remove(index)
                with share:
                    # Read with the lock held: what another process did on this share before is seen.
                    done = {key for key, p in self.results.predictions().items() if p.error is None}
                    self._work(share, batches[index::size], done, bar)

    def _work(self, share: Share, batches: list[list[Item]], done: set[Key], bar: tqdm) -> None:
        wanted = [(batch, missing) for batch in batches if (missing := self._missing(batch, done))]
        count = sum(map(len, batches)) * len(self.choices) * self.decoding.samples
        bar.update(count - sum(len(missing) for _, missing in wanted))
        bar.total = max(bar.total, bar.n + sum(len(missing) for _, missing in wanted))
        # The next batch's clips are decoded while the model answers this one.
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self._read, wanted[0][0]) if wanted else None
            for at, (batch, missing) in enumerate(wanted):
                clips = ahead.result()
                ahead = pool.submit(self._read, wanted[at + 1][0]) if at + 1 < len(wanted) else None
                for group, inputs in self._prepare(batch, clips):
                    self._answer(share, group, inputs, missing, bar)

    def _missing(self, batch: list[Item], done: set[Key]) -> set[Key]:
        methods, samples = [choice.name for choice in self.choices], range(self.decoding.samples)
        return {(name, item.id, sample) for name in methods for item in batch for sample in samples} - done

    def prepare(self, batch: list[Item]) -> list[tuple[list[Item], dict[str, Any] | str]]:
        """The inputs of a batch, in groups that can share a call; where nothing can be asked the reason instead."""
        return self._prepare(batch, self._read(batch))

    def _read(self, batch: list[Item]) -> list[Clip | str]:
        return [self._clip(item.path) for item in batch]

    def _prepare(self, batch: list[Item], clips: list[Clip | str]) -> list[tuple[list[Item], dict[str, Any] | str]]:
        groups: dict[Any, list[tuple[Item, Clip]]] = collections.defaultdict(list)
        refused: list[tuple[list[Item], dict[str, Any] | str]] = []
        for item, clip in zip(batch, clips, strict=True):
            if isinstance(clip, str):
                refused.append(([item], clip))
            else:
                # One call takes one frame rate; interleaving needs picture and sound in every clip.
                groups[clip.fps if clip.frames is not None else None, clip.missing].append((item, clip))
        prepared = [([item for item, _ in group], self._inputs(group)) for group in groups.values()]
        return [*prepared, *refused]

    def _inputs(self, group: list[tuple[Item, Clip]]) -> dict[str, Any] | str:
        inputs = prepare_batch(
            self.processor,
            [([clip], item.prompt) for item, clip in group],
            use_audio_in_video=self.reading.interleaved,
            frame_pixels=self.reading.frame_pixels,
        )
        width = inputs["input_ids"].shape[1]
        most = max_new_tokens_for([item for item, _ in group], self.limits, self.decoding)
        if self.context_limit is not None and width + most > self.context_limit:
            return f"prompt of {width} and answer of {most} tokens exceed the model's limit of {self.context_limit}"
        return inputs

    def _clip(self, path: Path | None) -> Clip | str:
        """The clip, or why it cannot be read. The last few are kept: questions about a video follow each other."""
        if path is None:
            return "the video is missing"
        if path not in self._clips:
            rates = {"fps": self.reading.fps, "max_frames": self.reading.max_frames}
            try:
                self._clips[path] = load_clip_for(self.processor, path, progress=False, **rates)
            except (MediaError, OSError) as error:
                self._clips[path] = str(error)
        self._clips.move_to_end(path)
        while len(self._clips) > 4:
            self._clips.popitem(last=False)
        return self._clips[path]

    def _answer(
        self, share: Share, group: list[Item], inputs: dict[str, Any] | str, missing: set[Key], bar: tqdm
    ) -> None:
        if not isinstance(inputs, str):
            inputs = to_device(inputs, self.model.device)
        for sample in range(self.decoding.samples):
            for choice in self.choices:
                due = [item for item in group if (choice.name, item.id, sample) in missing]
                if not due:
                    continue
                # The whole group again, also for the rest of one that was cut off: the batch is part of the answer.
                predictions = self._predictions(choice, group, inputs, sample)
                share.append(p for p in predictions if p.key in missing)
                bar.update(len(due))

    def _predictions(
        self, choice: Choice, group: list[Item], inputs: dict[str, Any] | str, sample: int
    ) -> Iterable[Prediction]:
        if isinstance(inputs, str):
            return [Prediction(choice.name, item.id, sample, item.prompt, None, error=inputs) for item in group]
        said = answer(
            self.model,
            self.processor,
            choice,
            inputs,
            self.decoding,
            max_new_tokens=max_new_tokens_for(group, self.limits, self.decoding),
            random_key=(sample, *(item.id for item in group)),
        )
        return [
            Prediction(
                choice.name,
                item.id,
                sample,
                item.prompt,
                text,
                *judged(item, text),
                tokens=tokens,
                first_token_s=said.first_token_s,
                seconds=said.seconds,
                batch=len(group),
            )
            for item, text, tokens in zip(group, said.texts, said.tokens, strict=True)
        ]


def judged(item: Item, raw: str) -> tuple[str | None, float | None]:
    """The answer that a text gives, and its score: 1 or 0, None for a caption."""
    parsed = parse_answer(item, raw)
    return parsed, None if item.kind == "caption" else float(parsed == item.answer)

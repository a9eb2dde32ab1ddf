"""Puts a benchmark's questions to a model by several methods; resumes, and shares the work among processes.

The batches follow from the chosen items alone, and never from what is done already or from the number of processes.
So an interrupted run that is resumed, or one that is shared, answers every question within the same batch as an
unbroken one, and gives the same predictions.

A question that fails is recorded with its reason, and the run goes on. Where a batch fails its questions are asked one
by one, and one that runs out of memory alone is tried once more with the memory freed.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from tqdm import tqdm

from fmd_ext.inputs.chat import to_device
from fmd_ext.inputs.media import clip_seconds
from fmd_ext.lab.eval.clips import (
    CUT_OFF,
    NON_FINITE,
    ClipInputs,
    Group,
    Reading,
    Shown,
    free_memory,
    is_out_of_memory,
    reason_of,
)
from fmd_ext.lab.eval.generation import Decoding, answer, max_new_tokens_for
from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.methods import Choice
from fmd_ext.lab.eval.parsing import judged
from fmd_ext.lab.eval.predictions import Key, Locked, Prediction, Results, Share


class DeviceLost(RuntimeError):
    """The GPU serves this process no more, as after a failed assertion in a kernel; a new process can go on."""


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
    seconds = {item.video: _seconds(item) for item in items}
    kinds = {"caption": 1}  # longer answers in batches of their own
    order = sorted(items, key=lambda item: (kinds.get(item.kind, 0), -seconds[item.video], item.video, item.id))
    groups: dict[int, list[Item]] = collections.defaultdict(list)
    for item in order:
        groups[kinds.get(item.kind, 0)].append(item)
    return [group[at : at + size] for group in groups.values() for at in range(0, len(group), size)]


def _seconds(item: Item) -> float:
    try:
        return clip_seconds(item.path)
    except Exception:  # a damaged file can raise anything; the question itself will say what is wrong with it
        return 0.0


class Runner:
    """Answers items by several methods and writes the predictions.

    Args:
        model, processor: as loaded; the model is unpatched.
        choices: the methods.
        results: where predictions go, within `Results.at_work`.
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
        self.clips = ClipInputs(processor, reading, self._refuse)

    def run(
        self,
        items: Sequence[Item],
        *,
        batch_size: int = 1,
        rank: int = 0,
        size: int = 1,
        progress: bool = True,
        retry_failed: bool = False,
    ) -> None:
        """Answers what is not answered yet, and with ``retry_failed`` what failed before.

        Batches are dealt to ``size`` shares; this process begins with share ``rank``, goes on with shares that nobody
        works on, such as that of a process that was killed, and returns when all shares are done. ``progress`` shows a
        bar on a terminal.

        Raises:
            Locked: processes of another number are at work in the folder.
            DeviceLost: no further question can be asked in this process.
            OSError: the predictions cannot be written.
        """
        self.results.refuse_others(size)
        batches = make_batches(items, batch_size)
        total = len(items) * len(self.choices) * self.decoding.samples
        with tqdm(
            total=total if size == 1 else -(-total // size),
            desc="answering" if size == 1 else f"answering ({rank + 1} of {size})",
            unit="answer",
            position=rank,
            disable=None if progress else True,  # None: off where stderr is no terminal
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
                    known = self.results.predictions()
                    done = {key for key, p in known.items() if p.error is None or not retry_failed}
                    self._work(share, batches[index::size], done, bar)

    def _work(self, share: Share, batches: list[list[Item]], done: set[Key], bar: tqdm) -> None:
        wanted = [(batch, missing) for batch in batches if (missing := self._missing(batch, done))]
        count = sum(map(len, batches)) * len(self.choices) * self.decoding.samples
        bar.update(count - sum(len(missing) for _, missing in wanted))
        bar.total = max(bar.total, bar.n + sum(len(missing) for _, missing in wanted))
        # The next batch's clips are decoded while the model answers this one.
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self.clips.read, wanted[0][0]) if wanted else None
            for at, (batch, missing) in enumerate(wanted):
                clips: list[Shown | str] = ahead.result()
                ahead = pool.submit(self.clips.read, wanted[at + 1][0]) if at + 1 < len(wanted) else None
                for group in self.clips.prepare(batch, clips):
                    self._answer(share, group, missing, bar)

    def _missing(self, batch: list[Item], done: set[Key]) -> set[Key]:
        methods, samples = [choice.name for choice in self.choices], range(self.decoding.samples)
        return {(name, item.id, sample) for name in methods for item in batch for sample in samples} - done

    def _refuse(self, width: int, items: Sequence[Item]) -> str | None:
        most = max_new_tokens_for(items, self.limits, self.decoding)
        if self.context_limit is None or width + most <= self.context_limit:
            return None
        return f"prompt of {width} and answer of {most} tokens exceed the model's limit of {self.context_limit}"

    def _answer(self, share: Share, group: Group, missing: set[Key], bar: tqdm) -> None:
        for sample in range(self.decoding.samples):
            for choice in self.choices:
                due = [item for item in group.items if (choice.name, item.id, sample) in missing]
                if not due:
                    continue
                # The whole group again, also for the rest of one that was cut off: the batch is part of the answer.
                try:
                    predictions = self._predictions(choice, group, sample)
                except DeviceLost as error:
                    failed = _failed(choice, group, sample, str(error))
                    share.append(p for p in failed if p.key in missing)
                    raise
                share.append(p for p in predictions if p.key in missing)
                bar.update(len(due))

    def _predictions(self, choice: Choice, group: Group, sample: int, *, retried: bool = False) -> list[Prediction]:
        if group.inputs is None:
            return _failed(choice, group, sample, group.error)
        try:
            return self._answered(choice, group, sample)
        except Exception as error:
            reason, out_of_memory = reason_of(error), is_out_of_memory(error)
            if not out_of_memory and isinstance(error, torch.AcceleratorError):
                raise DeviceLost(reason) from error
        # Behind the except clause: within it the error holds on to the call's tensors.
        if out_of_memory:
            free_memory()
        if len(group.items) > 1:
            alone = [single for item in group.items for single in self.clips.prepare([item])]
            return [p for single in alone for p in self._predictions(choice, single, sample)]
        if out_of_memory and not retried:
            return self._predictions(choice, group, sample, retried=True)
        return _failed(choice, group, sample, reason)

    def _answered(self, choice: Choice, group: Group, sample: int) -> list[Prediction]:
        said = answer(
            self.model,
            self.processor,
            choice,
            to_device(group.inputs, self.model.device),
            self.decoding,
            max_new_tokens=max_new_tokens_for(group.items, self.limits, self.decoding),
            random_key=(sample, *(item.id for item in group.items)),
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
                batch=len(group.items),
                shown=shown,
                notes=notes
                | said_of_it
                | ({} if ended else {CUT_OFF: f"after {tokens} tokens"})
                | ({NON_FINITE: f"in {steps} of {tokens} steps"} if steps else {}),
            )
            for item, text, tokens, ended, steps, said_of_it, shown, notes in zip(
                group.items,
                said.texts,
                said.tokens,
                said.ended,
                said.non_finite_steps,
                said.notes,
                group.shown,
                group.notes,
                strict=True,
            )
        ]


def _failed(choice: Choice, group: Group, sample: int, reason: str) -> list[Prediction]:
    shown, notes = group.shown or ({},) * len(group.items), group.notes or ({},) * len(group.items)
    return [
        Prediction(choice.name, item.id, sample, item.prompt, None, error=reason, shown=own, notes=own_notes)
        for item, own, own_notes in zip(group.items, shown, notes, strict=True)
    ]

"""A control, no published method: the prompt loses the modality that its question does not need.

It is the cheapest way to use what is known of a question's need: the answer comes from a shorter prompt, built as for a
clip without sound, or without picture. A sample whose question needs both keeps both, and so does one that has not
both.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Listed
from typing import Any

from torch import nn

from fmd_ext.adapters import AUDIO, PADDING, VISUAL, find_adapter
from fmd_ext.engine.routes import NEEDS
from fmd_ext.lab.baselines.decoding import Method, Part, Sequence, applied
from fmd_ext.lab.baselines.prompts import has_both, refuse_joint, without
from fmd_ext.patching.modality_question import ModalityQuestion
from fmd_ext.patching.routing import Router, answers_to

DROPPED = {"visual": AUDIO, "audio": VISUAL}  # what a question does not need
NAMES = {AUDIO: "audio dropped", VISUAL: "video dropped"}


@contextlib.contextmanager
def drop(
    model: nn.Module,
    *,
    needs: str | Listed[str] | Callable[[str], str] = "asked",
    processor: Any = None,
    wording: str | ModalityQuestion = "en",
) -> Iterator[Method]:
    """Within this context ``model.generate`` answers from prompts without the modality that is not needed.

    Args:
        model: a supported model, not patched.
        needs: one of NEEDS (visual, audio, both) for all questions, or one for each sample of the batch, or a function
            from the question's text to one of them; or ``"asked"``: the model itself is asked about the question, text
            only, and the likeliest answer counts.
        processor: the model's; only a function and ``"asked"`` need it.
        wording: of the asking, as in `Router`.

    The context's value has ``needs_of_last``: one of NEEDS per sample of the last prompt.

    Raises:
        ValueError: another need, no processor where one is needed, a patched model, or, in ``generate``, joint
            positions, or another number of needs than samples.
        TypeError: a model that is not supported, or, in ``generate``, one whose features cannot be told apart.
    """
    asks = needs == "asked" or callable(needs)
    for need in () if asks else [needs] if isinstance(needs, str) else needs:
        _check_need(need)
    if asks and processor is None:
        raise ValueError("to read the question off a prompt, drop needs the model's processor: drop(processor=...)")
    router = None
    if asks:
        router = Router(processor, wording) if needs == "asked" else Router(processor, wording, route=lambda _: None)
    with applied(model, Drop(model, needs, router)) as method:
        yield method


def _check_need(need: Any) -> None:
    if need not in NEEDS:
        raise ValueError(f'needs must be "asked", or of {", ".join(NEEDS)}; got {need!r}')


class Drop(Method):
    """See `drop`.

    Attributes:
        needs_of_last: of the last prompt, per sample.
    """

    def __init__(
        self, model: nn.Module, needs: str | Listed[str] | Callable[[str], str], router: Router | None
    ) -> None:
        super().__init__()
        self.model, self.needs, self.router = model, needs, router
        self.needs_of_last: list[str] = []

    def begin(self, sequence: Sequence, call: dict[str, Any]) -> None:
        refuse_joint(sequence.labels, "drop")
        both = has_both(sequence.labels).tolist()
        self.needs_of_last = self._needs(sequence, call)
        sequence.measured = [
            DROPPED.get(need) if has else None for need, has in zip(self.needs_of_last, both, strict=True)
        ]
        self.notes = [{} if label is None else {NAMES[label]: ""} for label in sequence.measured]

    def _needs(self, sequence: Sequence, call: dict[str, Any]) -> list[str]:
        batch = len(sequence.labels)
        if self.router is None:
            needs = [self.needs] * batch if isinstance(self.needs, str) else list(self.needs)
            if len(needs) != batch:
                raise ValueError(f"{len(needs)} needs are given for {batch} samples")
            return needs
        questions = []
        for ids, labels in zip(call["input_ids"].cpu().numpy(), sequence.labels.cpu().numpy(), strict=True):
            there = labels != PADDING
            questions.append(self.router.question_of(ids[there], labels[there]))
        if callable(self.needs):
            needs = [self.needs(question) for question in questions]
            for need in needs:
                _check_need(need)
            return needs
        adapter = find_adapter(self.model)
        entry, decoder = adapter.find_entry(self.model), adapter.find_decoder(self.model)
        # Without a question, all that is there is asked for.
        asked = [index for index, question in enumerate(questions) if question]
        found = ["both"] * batch
        if asked:
            prompts = [self.router.prompt_ids(questions[index]) for index in asked]
            routes = answers_to(self.router, entry, decoder, prompts)
            for index, best in zip(asked, routes.argmax(1), strict=True):
                found[index] = NEEDS[best]
        return found

    def instead(self, sequence: Sequence, call: dict[str, Any]) -> list[Part] | None:
        groups: dict[int | None, list[int]] = collections.defaultdict(list)
        for row, label in enumerate(sequence.measured):
            groups[label].append(row)
        if set(groups) == {None}:
            return None
        return [
            (rows, without(self.model, call, () if label is None else (label,), rows)) for label, rows in groups.items()
        ]

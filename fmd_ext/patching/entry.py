"""Replacements of the methods that take token ids or embeddings: they read the positions' modality labels off them."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import nn

from fmd_ext.decode import DecodeRunner
from fmd_ext.engine.forward import arguments_by_name, refuse_gradients
from fmd_ext.engine.session import Session
from fmd_ext.patching.labelling import (
    LabelReader,
    cached,
    covering,
    covering_prompt,
    only_new,
    prompt_ids,
    prompt_length,
    virtual_tokens,
)


class _Entry:
    """Replacement of ``forward`` or ``generate`` of the module that takes token ids."""

    def __init__(
        self, session: Session, original: Any, read_labels: LabelReader | None, branch_inputs: str = ""
    ) -> None:
        self.session = session
        self.read_labels = read_labels
        self.branch_inputs = branch_inputs
        self.original = original
        self.signature = inspect.signature(original)

    def arguments(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        return arguments_by_name(self.signature, args, kwargs)

    def labels(self, given: Any, read: Any) -> contextlib.AbstractContextManager:
        """The context with the labels given by hand, else those in force, else what ``read`` reads off the call."""
        by_hand = given is not None
        if not by_hand and self.read_labels is not None and not self.session.has_labels:
            given = read()
        return contextlib.nullcontext() if given is None else self.session.labels(given, by_hand)


class EntryForward(_Entry):
    def __call__(
        self, module: nn.Module, *args: Any, modality_labels: Any = None, branch_embeds: Any = None, **kwargs: Any
    ) -> Any:
        with self.session.turn:
            return self._run(module, args, kwargs, modality_labels, branch_embeds)

    def _run(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], modality_labels: Any, branch_embeds: Any
    ) -> Any:
        if not self.session.config.fork_layers or self.session.fixed_plan is not None:
            return self.original(*args, **kwargs)
        refuse_gradients(module)
        call = self.arguments(args, kwargs)
        with torch.no_grad(), self._labelled(call, modality_labels):
            if self.branch_inputs and branch_embeds is None:
                kwargs = getattr(module, self.branch_inputs)(self.session.config.mask_scale, **call)
                args, branch_embeds = (), kwargs.pop("branch_embeds", None)
            with self.session.branches(branch_embeds, cached(call)):
                return self.original(*args, **kwargs)

    def _labelled(self, call: dict[str, Any], given: Any) -> contextlib.AbstractContextManager:
        ids, embeds, past = call.get("input_ids"), call.get("inputs_embeds"), cached(call)
        length = past + (embeds if ids is None else ids).shape[1] if ids is not None or embeds is not None else 0
        if given is not None:
            return self.session.labels(covering(given, length))
        if ids is None and embeds is not None and self.read_labels is not None:
            return self._labelled_by_embeds(embeds, call, past, length)

        def from_ids() -> torch.Tensor | None:
            if ids is None:
                return None
            labels = self.read_labels.of_ids(ids, call)
            return labels if labels is None else _shifted(labels, past)

        return self.labels(None, from_ids)

    def _labelled_by_embeds(
        self, embeds: torch.Tensor, call: dict[str, Any], past: int, length: int
    ) -> contextlib.AbstractContextManager:
        """Labels by hand; else those read off the embeddings, which hold what others have put before the ids of a
        ``generate`` call, such as PEFT's virtual tokens."""
        by_hand = self.session.labels_by_hand
        if by_hand is not None:
            if past < by_hand.shape[1]:
                covering(by_hand, length)
            return contextlib.nullcontext()
        labels = self.read_labels.of_embeds(embeds, call)
        return (
            contextlib.nullcontext() if labels is None else self.session.labels(_shifted(labels, past), by_hand=False)
        )


class EntryGenerate(_Entry):
    """Labels the whole prompt: what is generated is text, whatever its id, and a prompt in chunks is one prompt."""

    def __init__(self, session: Session, original: Any, read_labels: LabelReader | None, runner: DecodeRunner) -> None:
        super().__init__(session, original, read_labels)
        self.runner = runner

    def __call__(
        self, module: nn.Module, *args: Any, modality_labels: Any = None, branch_embeds: Any = None, **kwargs: Any
    ) -> Any:
        call = self.arguments(args, kwargs)

        def from_ids() -> torch.Tensor | None:
            ids, past = prompt_ids(call), cached(call)
            if ids is None:
                return None
            labels = self.read_labels.of_ids(ids, None)
            return _shifted(labels, past) if only_new(ids, call.get("attention_mask"), past) else labels

        with (
            self.session.turn,
            self.labels(self._by_hand(module, call, modality_labels), from_ids),
            self.session.branches(branch_embeds, cached(call)),
            self.session.generating(call.get("attention_mask")),
        ):
            return self.runner.generate(module, self.original, call)

    def _by_hand(self, module: nn.Module, call: dict[str, Any], given: Any) -> Any:
        """Labels by hand for the sequence as the model will see it: PEFT may put virtual tokens before the prompt."""
        virtual, length = virtual_tokens(module), prompt_length(call)
        if given is None and virtual:
            given = self.session.labels_by_hand
        return given if given is None or length is None else covering_prompt(given, length, virtual)


def _shifted(labels: torch.Tensor, past: int) -> torch.Tensor:
    """Labels behind ``past`` cached positions, whose labels no longer matter."""
    return torch.cat([labels.new_zeros((labels.shape[0], past)), labels], dim=1) if past else labels

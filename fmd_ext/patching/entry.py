"""Replacements of the methods that take token ids: they read the positions' modality labels off the ids."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from fmd_ext.compat import cache_argument
from fmd_ext.decode import DecodeRunner
from fmd_ext.engine.cache import state_of
from fmd_ext.engine.forward import arguments_by_name, refuse_gradients
from fmd_ext.engine.prompt import Prompt, check_labels
from fmd_ext.engine.session import Session
from fmd_ext.labels import TEXT

# (token ids [batch, length], arguments of the call or None) -> labels [batch, length], None where there are none
ReadLabels = Callable[[torch.Tensor, dict[str, Any] | None], torch.Tensor | None]


class _Entry:
    """Replacement of ``forward`` or ``generate`` of the module that takes token ids."""

    def __init__(
        self, session: Session, original: Any, read_labels: ReadLabels | None, branch_inputs: str = ""
    ) -> None:
        self.session = session
        self.read_labels = read_labels
        self.branch_inputs = branch_inputs
        self.original = original
        self.signature = inspect.signature(original)
        self.cache_name = cache_argument(self.signature)

    def arguments(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        return arguments_by_name(self.signature, args, kwargs)

    def cached(self, call: dict[str, Any]) -> int:
        """The number of positions that the call's cache holds."""
        cache = call.get(self.cache_name)
        return 0 if cache is None else cache.get_seq_length()


class EntryForward(_Entry):
    """Says which prompt a forward call belongs to: labels are those of the ids and the cache that the call brings."""

    def __call__(
        self, module: nn.Module, *args: Any, modality_labels: Any = None, branch_embeds: Any = None, **kwargs: Any
    ) -> Any:
        with self.session.lock:
            return self._run(module, args, kwargs, modality_labels, branch_embeds)

    def _run(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], modality_labels: Any, branch_embeds: Any
    ) -> Any:
        session = self.session
        if not session.config.fork_layers or session.call is not None:  # a static step brings its call
            return self.original(*args, **kwargs)
        refuse_gradients(module)
        call = self.arguments(args, kwargs)
        with torch.no_grad():
            prompt = self._prompt(call, modality_labels)
            if self.branch_inputs and branch_embeds is None:
                call = getattr(module, self.branch_inputs)(session.config.mask_scale, **call)
                branch_embeds = call.pop("branch_embeds", None)
            if branch_embeds is not None:
                prompt = (prompt or Prompt(None)).with_branches(branch_embeds, self.cached(call))
            with session.receiving(prompt):
                return self.original(**call)

    def _prompt(self, call: dict[str, Any], modality_labels: Any) -> Prompt | None:
        """The labels given by hand, else those of the `generate` call that this call is part of, else those of the
        context, else those that the call's own ids and features tell."""
        session, past = self.session, self.cached(call)
        if modality_labels is not None:
            return Prompt(check_labels(modality_labels))
        generating, state = session.generating, state_of(call.get(self.cache_name))
        if generating is not None:
            if past and state is not None and generating.is_one_with(state.prompt):
                return generating
            given = next((v for v in (call.get("input_ids"), call.get("inputs_embeds")) if v is not None), None)
            if not past and generating.starts(given) and self._brings_features(generating, call):
                return generating
        if session.labels_of_context is not None:
            return session.labels_of_context
        ids = call.get("input_ids")
        labels = None if self.read_labels is None or ids is None else self.read_labels(ids, call)
        return None if labels is None else Prompt(_shifted(labels, past))

    def _brings_features(self, prompt: Prompt, call: dict[str, Any]) -> bool:
        """Whether the call feeds every placeholder of ``prompt`` that it holds; without, it is another prompt."""
        ids = call.get("input_ids")
        if ids is None or not prompt.is_read or not prompt.has_content:
            return True
        labels = prompt.labels_for(len(ids))[:, : ids.shape[1]]
        fed = self.read_labels(ids[:, : labels.shape[1]], call)
        fed = np.zeros_like(labels) if fed is None else check_labels(fed)
        return bool((fed > TEXT)[labels > TEXT].all())


class EntryGenerate(_Entry):
    """Labels the whole prompt: what is generated is text, whatever its id, and a prompt in chunks is one prompt."""

    def __init__(self, session: Session, original: Any, read_labels: ReadLabels | None, runner: DecodeRunner) -> None:
        super().__init__(session, original, read_labels)
        self.runner = runner

    def __call__(
        self, module: nn.Module, *args: Any, modality_labels: Any = None, branch_embeds: Any = None, **kwargs: Any
    ) -> Any:
        call = self.arguments(args, kwargs)
        with self.session.lock:
            prompt = self._prompt(call, modality_labels, branch_embeds)
            state = state_of(call.get(self.cache_name))
            if state is not None and state.logical_length:
                state.prompt = prompt
            with self.session.generating_from(prompt):
                return self.runner.generate(module, self.original, call)

    def _prompt(self, call: dict[str, Any], modality_labels: Any, branch_embeds: Any) -> Prompt:
        ids = next((v for v in (call.get("input_ids"), call.get("inputs")) if v is not None), None)
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point():
            ids = None
        past, mask = self.cached(call), call.get("attention_mask")
        mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        # Read back here once, the prompt's mask need not be for every token.
        width = mask.shape[1] if mask is not None and bool(mask[:, -1].all()) else None
        context = self.session.labels_of_context
        if modality_labels is not None:
            labels = check_labels(modality_labels)
        elif context is not None:
            labels = context.labels
        elif self.read_labels is None or ids is None or (read := self.read_labels(ids, call)) is None:
            labels = None
        else:
            # As transformers decides it: ids shorter than the mask are the new ones only.
            only_new = past and mask is not None and mask.shape[1] != ids.shape[1]
            labels = _shifted(read, past if only_new else 0)
        embeds = call.get("inputs_embeds")
        is_read = labels is not None and modality_labels is None and context is None
        return Prompt(labels, ids if embeds is None else embeds, past, branch_embeds, width, is_read)


def _shifted(labels: torch.Tensor, past: int) -> np.ndarray:
    """Labels behind ``past`` cached positions, whose labels no longer matter."""
    return np.pad(check_labels(labels), ((0, 0), (past, 0)))

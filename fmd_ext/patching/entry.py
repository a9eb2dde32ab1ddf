"""Replacements of the methods that take token ids: they read the positions' modality labels off the ids."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fmd_ext.compat import cache_argument
from fmd_ext.decode import DecodeRunner
from fmd_ext.engine.forward import arguments_by_name, refuse_gradients
from fmd_ext.engine.session import Session

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

    def labels(self, given: Any, from_ids: Any) -> contextlib.AbstractContextManager:
        """The context with the labels given by hand, else those in force, else those read off the token ids."""
        if given is None and self.read_labels is not None and not self.session.has_labels:
            given = from_ids()
        return contextlib.nullcontext() if given is None else self.session.labels(given)


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

        def from_ids() -> torch.Tensor | None:
            ids, cache = call.get("input_ids"), call.get(self.cache_name)
            if ids is None:
                return None
            labels = self.read_labels(ids, call)
            return labels if labels is None or cache is None else _shifted(labels, cache.get_seq_length())

        with torch.no_grad(), self.labels(modality_labels, from_ids):
            if self.branch_inputs and branch_embeds is None:
                kwargs = getattr(module, self.branch_inputs)(self.session.config.mask_scale, **call)
                args, branch_embeds = (), kwargs.pop("branch_embeds", None)
            with self.session.branches(branch_embeds, self.cached(call)):
                return self.original(*args, **kwargs)


class EntryGenerate(_Entry):
    """Labels the whole prompt: what is generated is text, whatever its id, and a prompt in chunks is one prompt."""

    def __init__(self, session: Session, original: Any, read_labels: ReadLabels | None, runner: DecodeRunner) -> None:
        super().__init__(session, original, read_labels)
        self.runner = runner

    def __call__(
        self, module: nn.Module, *args: Any, modality_labels: Any = None, branch_embeds: Any = None, **kwargs: Any
    ) -> Any:
        call = self.arguments(args, kwargs)

        def from_ids() -> torch.Tensor | None:
            ids = next((v for v in (call.get("input_ids"), call.get("inputs")) if v is not None), None)
            if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point():
                return None
            labels = self.read_labels(ids, None)
            cache = call.get(self.cache_name)
            mask = call.get("attention_mask")
            # As transformers decides it: ids shorter than the mask are the new ones only.
            only_new = cache is not None and mask is not None and mask.shape[1] != ids.shape[1]
            return _shifted(labels, cache.get_seq_length()) if only_new else labels

        with (
            self.session.turn,
            self.labels(modality_labels, from_ids),
            self.session.branches(branch_embeds, self.cached(call)),
            self.session.generating(call.get("attention_mask")),
        ):
            return self.runner.generate(module, self.original, call)


def _shifted(labels: torch.Tensor, past: int) -> torch.Tensor:
    """Labels behind ``past`` cached positions, whose labels no longer matter."""
    return torch.cat([labels.new_zeros((labels.shape[0], past)), labels], dim=1) if past else labels

"""Replacements of the methods that take token ids or embeddings: they say which prompt a call belongs to."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import nn

from fmd_ext.compat import cache_argument
from fmd_ext.decode import DecodeRunner
from fmd_ext.engine.cache import state_of
from fmd_ext.engine.forward import arguments_by_name, refuse_gradients
from fmd_ext.engine.prompt import Prompt, check_labels, covering
from fmd_ext.engine.routes import Routes
from fmd_ext.engine.session import Session
from fmd_ext.labels import TEXT
from fmd_ext.patching.fusions.kept_logits import KeptLogits
from fmd_ext.patching.labelling import (
    LabelReader,
    cached,
    covering_prompt,
    only_new,
    prompt_ids,
    prompt_length,
    virtual_tokens,
)
from fmd_ext.patching.routing import Asking


class _Entry:
    """Replacement of ``forward`` or ``generate`` of the module that takes token ids."""

    def __init__(
        self,
        session: Session,
        original: Any,
        read_labels: LabelReader | None,
        asking: Asking | None = None,
        branch_inputs: str = "",
        kept: KeptLogits | None = None,
    ) -> None:
        self.session = session
        self.kept = KeptLogits() if kept is None else kept
        self.read_labels = read_labels
        self.asking = asking
        self.branch_inputs = branch_inputs
        self.original = original
        self.signature = inspect.signature(original)
        self.cache_name = cache_argument(self.signature)

    def arguments(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        return arguments_by_name(self.signature, args, kwargs)

    def routes(self, ids: torch.Tensor | None, labels: np.ndarray | None) -> Routes | None:
        """What the questions of a prompt need, where the settings leave it to them; ``labels`` are those of ``ids``."""
        if self.asking is None:
            return None
        self.asking.last = None
        if self.session.routes_of_context is not None:
            return None
        if labels is None or not (labels > TEXT).any():
            return None
        if ids is None:
            self.asking.tell_of_unread()
            return None
        return self.asking.routes_of(ids, labels)


class EntryForward(_Entry):
    """Says which prompt a forward call belongs to: labels are those of the ids and the cache that the call brings."""

    def __call__(
        self, module: nn.Module, *args: Any, modality_labels: Any = None, branch_embeds: Any = None, **kwargs: Any
    ) -> Any:
        with self.kept.of(kwargs):
            return self._run(module, args, kwargs, modality_labels, branch_embeds)

    def _run(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], modality_labels: Any, branch_embeds: Any
    ) -> Any:
        session = self.session
        if not session.config.fork_layers or session.call is not None:  # a static step brings its call
            return self.original(*args, **kwargs)
        refuse_gradients(module)
        call = self.arguments(args, kwargs)
        past = cached(call)
        length = _length(call, past)
        with torch.no_grad():
            prompt = self._prompt(call, modality_labels, past, length)
            if self.asking is not None and not past and (prompt is None or prompt.routes is None):
                routes = self.routes(call.get("input_ids"), None if prompt is None else prompt.labels)
                prompt = prompt and prompt.with_routes(routes)
            if self.branch_inputs and branch_embeds is None:
                call = getattr(module, self.branch_inputs)(session.config.mask_scale, **call)
                branch_embeds = call.pop("branch_embeds", None)
            if branch_embeds is not None:
                prompt = (prompt or Prompt(None)).with_branches(branch_embeds, past)
            with session.receiving(prompt or Prompt(None), length):
                return self.original(**call)

    def _prompt(self, call: dict[str, Any], modality_labels: Any, past: int, length: int) -> Prompt | None:
        """The prompt of a call of ``length`` positions, ``past`` cached ones included. Labels given by hand come first,
        then those of the `generate` call that it belongs to, those of the context, and those read off the call's own
        ids (or embeddings) and features."""
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        given = embeds if ids is None else ids
        if modality_labels is not None:
            return Prompt(covering(check_labels(modality_labels), length))
        generating, context = self.session.generating, self.session.labels_of_context
        if generating is not None and self._is_part_of(generating, call, given, past):
            return generating.begin()
        if context is not None:
            if ids is None and past < context.labels.shape[1]:
                covering(context.labels, length)
            return context
        if self.read_labels is None or given is None:
            return None
        labels = self.read_labels.of_embeds(embeds, call) if ids is None else self.read_labels.of_ids(ids, call)
        return None if labels is None else Prompt(_shifted(labels, past), is_read=True)

    def _is_part_of(self, prompt: Prompt, call: dict[str, Any], given: torch.Tensor | None, past: int) -> bool:
        """Whether a call with ids or embeddings ``given`` belongs to the `generate` call of ``prompt``.

        Raises ValueError where labels were given by hand and the first call begins with something else.
        """
        if past:
            state = state_of(call.get(self.cache_name))
            return state is not None and prompt.is_one_with(state.prompt)
        if prompt.starts(given) and self._brings_features(prompt, call):
            return True
        if prompt.waits_for_its_labels:
            shape = None if given is None else list(given.shape)
            raise ValueError(
                f"generate was given modality_labels {list(prompt.labels.shape)} for its prompt, but calls the model "
                f"with another one first, of shape {shape}: something has changed the prompt in between"
            )
        return False

    def _brings_features(self, prompt: Prompt, call: dict[str, Any]) -> bool:
        """Whether the call has the features of all placeholders in it. If not, it belongs to another prompt."""
        ids = call.get("input_ids")
        if ids is None or not prompt.is_read or not prompt.has_content:
            return True
        labels = prompt.labels_for(len(ids))[:, : ids.shape[1]]
        read = self.read_labels.of_ids(ids[:, : labels.shape[1]], call)
        fed = np.zeros_like(labels) if read is None else check_labels(read)
        return bool((fed > TEXT)[labels > TEXT].all())


class EntryGenerate(_Entry):
    """Labels the whole prompt at once: its chunks fork alike, and generated tokens are text, whatever their ids."""

    def __init__(
        self,
        session: Session,
        original: Any,
        read_labels: LabelReader | None,
        asking: Asking | None,
        runner: DecodeRunner,
    ) -> None:
        super().__init__(session, original, read_labels, asking)
        self.runner = runner

    def __call__(
        self, module: nn.Module, *args: Any, modality_labels: Any = None, branch_embeds: Any = None, **kwargs: Any
    ) -> Any:
        call = self.arguments(args, kwargs)
        with self.session.lock:
            prompt = self._prompt(module, call, modality_labels, branch_embeds)
            with torch.no_grad():
                prompt.routes = self._routes(prompt, call)
            state = state_of(call.get(self.cache_name))
            if state is not None and state.logical_length:
                state.prompt = prompt.begin()
            with self.session.generating_from(prompt):
                return self.runner.generate(module, self.original, call)

    def _prompt(self, module: nn.Module, call: dict[str, Any], modality_labels: Any, branch_embeds: Any) -> Prompt:
        ids, embeds, past, mask = prompt_ids(call), call.get("inputs_embeds"), cached(call), call.get("attention_mask")
        mask = mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        # Read back from the device once per prompt, not once per token.
        width = mask.shape[1] if mask is not None and bool(mask[:, -1].all()) else None
        virtual, length = virtual_tokens(module), prompt_length(call)
        context, labels, is_read = self.session.labels_of_context, modality_labels, False
        if labels is None and context is not None:
            labels = context.labels
        if labels is not None:
            # Labels of a context may be those of a longer sequence. Virtual tokens come before all others.
            is_exact = length is not None and (modality_labels is not None or virtual)
            labels = covering_prompt(labels, length, virtual) if is_exact else check_labels(labels)
        elif self.read_labels is not None and (ids is not None or embeds is not None):
            # Embeddings are those of the whole sequence, as an attention mask is.
            labels = self.read_labels.of_embeds(embeds, call) if ids is None else self.read_labels.of_ids(ids, call)
            if is_read := labels is not None:
                labels = _shifted(labels, past if ids is not None and only_new(ids, mask, past) else 0)
        source = ids if embeds is None else embeds
        return Prompt(labels, source, past, branch_embeds, width, is_read, virtual)

    def _routes(self, prompt: Prompt, call: dict[str, Any]) -> Routes | None:
        """What the questions of the prompt need, or of a later turn behind a cache in which samples have forked."""
        ids, labels, past = prompt_ids(call), prompt.labels, cached(call)
        if ids is None:
            return self.routes(None, labels)
        state = state_of(call.get(self.cache_name))
        if state is not None and state.has_forked:
            if self.asking is None or self.session.routes_of_context is not None:
                return self.routes(None, None)
            return self.asking.routes_of_turn(ids)
        if labels is not None:  # they count virtual and cached positions that the ids may not have
            first = prompt.virtual + (past if only_new(ids, call.get("attention_mask"), past) else 0)
            labels = labels[:, first : first + ids.shape[1]]
        return self.routes(ids, labels)


def _length(call: dict[str, Any], past: int) -> int:
    """Positions of a forward call's ids or embeddings, and the ``past`` ones that its cache holds."""
    given = call.get("inputs_embeds") if call.get("input_ids") is None else call["input_ids"]
    return past + (0 if given is None else given.shape[1])


def _shifted(labels: torch.Tensor, past: int) -> np.ndarray:
    """Labels after ``past`` cached positions, which get text labels: the cache has planned them already."""
    return np.pad(check_labels(labels), ((0, 0), (past, 0)))

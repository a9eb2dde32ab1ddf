"""The modality labels of a call: read off its ids or embeddings, or given by hand and checked against its length."""

from __future__ import annotations

import logging
import operator
from typing import Any

import numpy as np
import torch
from torch import nn

from fmd_ext.adapters import Adapter
from fmd_ext.compat import NEW_CACHE_NAME, OLD_CACHE_NAME
from fmd_ext.engine.prompt import check_labels
from fmd_ext.labels import LABELS, TEXT

logger = logging.getLogger(__name__)


class LabelReader:
    """Reads labels [batch, length] off the calls of one model. One per patch."""

    def __init__(self, adapter: Adapter, model: nn.Module) -> None:
        self.adapter = adapter
        self.model = model
        self._said = False

    def of_ids(self, ids: torch.Tensor, call: dict[str, Any] | None) -> torch.Tensor | None:
        """See `Adapter.labels_of`."""
        return self.adapter.labels_of(self.model, ids, call)

    def of_embeds(self, embeds: torch.Tensor, call: dict[str, Any]) -> torch.Tensor | None:
        """Labels of ``embeds`` [batch, length, hidden]: a placeholder's embedding has its modality.

        transformers finds the positions of features in embeddings by the same comparison. None where ``call`` brings no
        features. Raises ValueError for features of both modalities without a placeholder.
        """
        sources = [source for source in self.adapter.sources if source.is_fed_by(call)]
        if not sources:
            self._tell_of_embeds(call)
            return None
        entry = self.adapter.find_entry(self.model)
        embed, config = entry.get_input_embeddings(), entry.config
        labels = torch.zeros(embeds.shape[:2], dtype=torch.int8, device=embeds.device)
        for source in sources:
            token = torch.tensor([operator.attrgetter(source.token_id)(config)], device=embeds.device)
            found = (embeds == embed(token).to(embeds.device)).all(-1)
            labels.masked_fill_(found, LABELS[source.modality])
        if len({source.modality for source in sources} - {"joint"}) > 1 and not labels.any():
            names = sorted({name for source in sources for name in source.inputs if call.get(name) is not None})
            raise ValueError(
                f"{', '.join(names)} came with inputs_embeds in which no position has the embedding of a placeholder, "
                "so that nothing tells what is visual and what is audio: give input_ids, or modality_labels"
            )
        return labels

    def _tell_of_embeds(self, call: dict[str, Any]) -> None:
        if not self._said and self.adapter.sources and not cached(call):
            self._said = True
            logger.warning(
                "fmd_ext: inputs_embeds came without input_ids, features and modality_labels: what they hold counts "
                "as text, and nothing is forked; give modality_labels where they hold a clip"
            )


def cached(call: dict[str, Any]) -> int:
    """The number of positions that the call's cache holds, by either of its names."""
    cache = next((call[name] for name in (NEW_CACHE_NAME, OLD_CACHE_NAME) if call.get(name) is not None), None)
    return 0 if cache is None else cache.get_seq_length()


def covering_prompt(labels: Any, length: int, virtual: int) -> np.ndarray:
    """Labels given by hand for a prompt of ``length`` positions, with text labels for ``virtual`` positions before it.

    Raises ValueError for labels of another length.
    """
    labels = check_labels(labels)
    if labels.shape[1] == length:
        return np.pad(labels, ((0, 0), (virtual, 0)), constant_values=TEXT)
    if labels.shape[1] != length + virtual:
        more = f" (and {virtual} virtual tokens before them)" if virtual else ""
        raise ValueError(
            f"modality_labels are for {labels.shape[1]} positions, the prompt has {length}{more}: label every one, 0 "
            "where it is text"
        )
    return labels


def virtual_tokens(model: nn.Module) -> int:
    """Number of positions that PEFT's prompt learning puts before the prompt of the running ``generate``.

    While PEFT (0.21) generates, ``prepare_inputs_for_generation`` of the base model is a method of the wrapper.
    """
    wrapper = getattr(model.__dict__.get("prepare_inputs_for_generation"), "__self__", None)
    config = getattr(wrapper, "active_peft_config", None)
    return config.num_virtual_tokens if getattr(config, "is_prompt_learning", False) else 0


def prompt_length(call: dict[str, Any]) -> int | None:
    """The length of the sequence that a ``generate`` call starts with, cached positions included; None: not known."""
    ids = prompt_ids(call)
    embeds, mask, past = call.get("inputs_embeds"), call.get("attention_mask"), cached(call)
    if isinstance(embeds, torch.Tensor) and embeds.dim() == 3:
        return embeds.shape[1]  # transformers takes them for the whole sequence, cached positions included
    if ids is None:
        return None
    return past + ids.shape[1] if only_new(ids, mask, past) else ids.shape[1]


def prompt_ids(call: dict[str, Any]) -> torch.Tensor | None:
    """Token ids [batch, length] that ``generate`` was given, under either name."""
    ids = next((v for v in (call.get("input_ids"), call.get("inputs")) if v is not None), None)
    is_ids = isinstance(ids, torch.Tensor) and ids.dim() == 2 and not ids.is_floating_point()
    return ids if is_ids else None


def only_new(ids: torch.Tensor, mask: Any, past: int) -> bool:
    """Whether ``ids`` are the new positions only: their length differs from the mask's, which is transformers' rule."""
    return past > 0 and mask is not None and mask.shape[1] != ids.shape[1]

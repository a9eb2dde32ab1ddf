"""What the served models have in common, as mixins in front of vLLM's own model and processor classes."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.models.utils import maybe_prefix

from fmd_ext.serve.decoder import ForkedDecoder
from fmd_ext.serve.settings import served_settings
from fmd_ext.serve.tokens import ReservedIds, first_reserved_id, swap

SWITCH = "fmd"  # among a request's mm_processor_kwargs: true (default) or false


class ForkedThinker:
    """In front of a thinker of vLLM: its decoder forks, for the requests that ask for it."""

    requires_raw_input_tokens: ClassVar[bool] = True  # the labels are read off the ids

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        settings = served_settings(vllm_config)
        self.reserved = ReservedIds(self.config)
        most = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("both_paddings", torch.zeros(2 * most, dtype=torch.bool), persistent=False)
        self.forks = settings.fork_layers > 0
        if self.forks:
            self.language_model.model = ForkedDecoder(
                vllm_config=vllm_config,
                prefix=maybe_prefix(prefix, "language_model.model"),
                decoder=self.language_model.model,
                settings=settings,
                reserved=self.reserved,
            )

    def embed_input_ids(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().embed_input_ids(self.reserved.restore(input_ids), *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.forks and is_forward_context_available():
            context = get_forward_context()
            context.is_padding = self._paddings_of_both(context.is_padding)
        return super().forward(*args, **kwargs)

    def _paddings_of_both(self, is_padding: torch.Tensor | None) -> torch.Tensor | None:
        """The mask [tokens] that keeps padding away from experts, for the rows of both branches [2 * tokens].

        Layers behind the fork take as much of it as they have rows: the first half. It lies in one place always,
        because a CUDA graph remembers the place.
        """
        if is_padding is None:
            return None
        both = self.both_paddings[: 2 * len(is_padding)]
        both.view(2, -1).copy_(is_padding)
        return both

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits = super().compute_logits(hidden_states)
        return None if logits is None else self.reserved.forbid(logits)


class ForkedProcessor:
    """In front of a thinker's processor: a request with picture and sound gets reserved ids, if it does not opt out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vocabulary = self.info.get_hf_config().text_config.vocab_size
        highest = max(self.info.get_tokenizer().get_vocab().values())
        if highest >= first_reserved_id(vocabulary):
            raise ValueError(
                f"fork-merge decoding needs the last 3 of the {vocabulary} ids that the model embeds, and the "
                f"tokenizer uses up to {highest}; fmd_ext.serve.folder.write_full_model writes a copy with more"
            )

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        kwargs = dict(inputs.hf_processor_mm_kwargs)
        on = kwargs.pop(SWITCH, True)  # not part of what the items are hashed with: they are the same either way
        if not isinstance(on, bool):
            raise ValueError(f"mm_processor_kwargs[{SWITCH!r}] must be true or false, got {on!r}")
        processed = super().apply(dataclasses.replace(inputs, hf_processor_mm_kwargs=kwargs), timing_ctx)
        counts = inputs.mm_data_items.get_all_counts()
        if on and counts.get("audio") and (counts.get("video") or counts.get("image")):
            processed["prompt_token_ids"] = swap(processed["prompt_token_ids"], self.info.get_hf_config())
        return processed

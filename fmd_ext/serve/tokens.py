"""Reserved token ids: how a request says, position by position, what each branch masks.

A chunk of a prompt may end inside the video, and then nothing in it tells whether audio follows. So the processor,
which sees the whole request, writes other ids for the placeholders of a request with both modalities: the last three
of the vocabulary, which no token has. A label is then a comparison of ids on the device, whatever the chunks; and since
vLLM finds cached blocks by their ids, what is masked and what is not never share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

# Attributes of the thinker's configuration, in the order of their reserved ids.
PLACEHOLDERS = ("image_token_id", "video_token_id", "audio_token_id")


def first_reserved_id(vocab_size: int) -> int:
    return vocab_size - len(PLACEHOLDERS)


class ReservedIds(nn.Module):
    """Maps reserved ids back and reads labels off them, on the device of the model.

    Args:
        thinker_config: with the placeholders' ids and ``text_config.vocab_size``.
    """

    def __init__(self, thinker_config: Any) -> None:
        super().__init__()
        self.first = first_reserved_id(thinker_config.text_config.vocab_size)
        usual = [getattr(thinker_config, name) for name in PLACEHOLDERS]
        self.register_buffer("usual", torch.tensor(usual), persistent=False)

    def restore(self, ids: torch.Tensor) -> torch.Tensor:
        """``ids`` [tokens] with the usual placeholders."""
        usual = self.usual.to(ids.dtype)[(ids - self.first).clamp(0, len(PLACEHOLDERS) - 1)]
        return torch.where(ids >= self.first, usual, ids)

    def labels(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of ``ids`` [tokens] are visual, and which audio, in a request that forks; bool [tokens] each."""
        is_audio = ids == self.first + 2
        return (ids >= self.first) & ~is_audio, is_audio

    def forbid(self, logits: torch.Tensor) -> torch.Tensor:
        """``logits`` [tokens, vocabulary] in which reserved ids cannot be sampled; changed in place."""
        logits[..., self.first : self.first + len(PLACEHOLDERS)] = float("-inf")
        return logits


def swap(ids: Sequence[int], thinker_config: Any) -> list[int]:
    """``ids`` of a prompt with reserved ids in the place of placeholders."""
    first = first_reserved_id(thinker_config.text_config.vocab_size)
    reserved = {getattr(thinker_config, name): first + index for index, name in enumerate(PLACEHOLDERS)}
    return [reserved.get(token, token) for token in ids]

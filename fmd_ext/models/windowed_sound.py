"""Sound as the video-SALMONN 2 models hear it: Whisper's states, window by window, through a small Q-Former.

What the models of the family share; each has its own Whisper encoder before it and its own projection behind it.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import InstructBlipQFormerConfig
from transformers.models.instructblip.modeling_instructblip import (
    InstructBlipQFormerIntermediate,
    InstructBlipQFormerMultiHeadAttention,
    InstructBlipQFormerOutput,
    InstructBlipQFormerSelfOutput,
)


def window_frames(seconds: float) -> int:
    """Whisper's states (50 per second) in so many seconds, rounded as the official code does."""
    return round(1500 * seconds / 30.0)


def num_windows(frames: int, window: int, stride: int) -> int:
    """Whole windows of ``window`` states, ``stride`` apart, among ``frames``; what is left at the end is not heard."""
    return (frames - window) // stride + 1


def log_mel_windows(extractor: Any, wave: np.ndarray) -> torch.Tensor:
    """Whisper's log-mel features of a sound of any length, cut into its windows of 30 s, each scaled by itself.

    Args:
        extractor: Whisper's feature extractor.
        wave: float32 [samples], at the extractor's sampling rate.

    Returns:
        float32 [windows, mel bins, frames]; the last window is silent behind the sound.
    """
    pieces = [wave[start : start + extractor.n_samples] for start in range(0, len(wave), extractor.n_samples)]
    return extractor(pieces, sampling_rate=extractor.sampling_rate, return_tensors="pt")["input_features"]


class WindowedQFormer(nn.Module):
    """Reads each window of a sound with the same learned queries; windows know nothing of each other.

    Parameters are named as in the official code: those of a BERT without words and positions, in which queries attend
    to each other and to the states.

    Args:
        config: its ``encoder_hidden_size`` is the width of the states.
    """

    def __init__(self, config: InstructBlipQFormerConfig) -> None:
        super().__init__()
        config = copy.deepcopy(config)
        config._attn_implementation = "sdpa"
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        layers = nn.ModuleList([_Layer(config, index) for index in range(config.num_hidden_layers)])
        self.bert = nn.ModuleDict(
            {"embeddings": nn.ModuleDict({"LayerNorm": norm}), "encoder": nn.ModuleDict({"layer": layers})}
        )

    def forward(self, states: torch.Tensor, queries: torch.Tensor, window: int, stride: int) -> torch.Tensor:
        """Tokens of sounds.

        Args:
            states: [sounds, frames, encoder_hidden_size].
            queries: [1, queries, hidden_size].
            window, stride: length and distance of the windows, in frames.

        Returns:
            [sounds, windows * queries, hidden_size].
        """
        windows = states.unfold(1, window, stride).transpose(2, 3)  # [sounds, windows, window, width]
        flat = windows.flatten(0, 1)
        hidden = self.bert["embeddings"]["LayerNorm"](queries).expand(len(flat), -1, -1)
        for layer in self.bert["encoder"]["layer"]:
            hidden = layer(hidden, flat)
        return hidden.reshape(len(states), -1, hidden.shape[-1])


class _Layer(nn.Module):
    def __init__(self, config: InstructBlipQFormerConfig, index: int) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.crossattention = None
        if index % config.cross_attention_frequency == 0:
            self.crossattention = _Attention(config, is_cross_attention=True)
        self.intermediate_query = InstructBlipQFormerIntermediate(config)
        self.output_query = InstructBlipQFormerOutput(config)

    def forward(self, hidden: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """hidden [windows, queries, hidden_size], states [windows, window, width] -> like hidden."""
        hidden = self.attention(hidden)
        if self.crossattention is not None:
            hidden = self.crossattention(hidden, states)
        return self.output_query(self.intermediate_query(hidden), hidden)


class _Attention(nn.Module):
    """transformers' attention under the official names (``self``, ``output``)."""

    def __init__(self, config: InstructBlipQFormerConfig, is_cross_attention: bool = False) -> None:
        super().__init__()
        self.self = InstructBlipQFormerMultiHeadAttention(config, is_cross_attention)
        self.output = InstructBlipQFormerSelfOutput(config)

    def forward(self, hidden: torch.Tensor, states: torch.Tensor | None = None) -> torch.Tensor:
        return self.output(self.self(hidden, encoder_hidden_states=states)[0], hidden)

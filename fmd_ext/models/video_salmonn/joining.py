"""Picture, speech and sound joined channel by channel, and the causal Q-Former that makes tokens of them."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn
from transformers import InstructBlipQFormerConfig
from transformers.models.instructblip.modeling_instructblip import (
    InstructBlipQFormerAttention,
    InstructBlipQFormerIntermediate,
    InstructBlipQFormerOutput,
)

from .configuration import VideoSalmonnConfig


class JointQFormer(nn.Module):
    """Two passes over the joined frames, one per resolution, side by side in the channels of the tokens.

    The coarse pass looks at groups of ``frames_per_group`` frames, the fine one at groups of ``fine_frames_per_group``,
    with the same layers and their own queries.
    """

    def __init__(self, config: VideoSalmonnConfig) -> None:
        super().__init__()
        qformer = config.joint_qformer_config
        width, hidden = qformer.encoder_hidden_size, qformer.hidden_size
        self.frame_size, self.speech_size = config.num_query_tokens, config.speech_tokens_per_frame
        self.frames_per_group, self.fine_frames_per_group = config.frames_per_group, config.fine_frames_per_group
        self.norm = nn.LayerNorm(width)
        self.position_embedding = nn.Embedding(config.max_group_positions, width)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_joint_queries, hidden))
        self.fine_query_tokens = nn.Parameter(torch.zeros(1, config.num_fine_queries, hidden))
        self.query_norm = nn.LayerNorm(hidden, eps=qformer.layer_norm_eps)
        self.layers = nn.ModuleList([JointQFormerLayer(qformer) for _ in range(qformer.num_hidden_layers)])

    def forward(self, video: torch.Tensor | None, audio: torch.Tensor | None) -> torch.Tensor:
        """Tokens of one clip.

        Args:
            video: [variants, frames, 32, hidden] or None, picture.
            audio: [variants, half seconds, 25, 2 * hidden] or None, speech and sound side by side.

        Returns:
            [variants, tokens, 2 * hidden of the joint Q-Former], 30 tokens for every 10 frames begun. What one of the
            two lacks in length, or altogether, is zero.
        """
        joined = torch.cat(self._aligned(video, audio), dim=-1)  # [variants, frames, 32, width]
        variants, frames = joined.shape[:2]
        padded = F.pad(joined, (0, 0, 0, 0, 0, -frames % self.frames_per_group))
        is_real = torch.arange(padded.shape[1], device=joined.device) < frames
        passes = (
            (self.fine_frames_per_group, self.fine_query_tokens),
            (self.frames_per_group, self.query_tokens),
        )
        tokens = [
            self._run(padded, is_real, size, queries).view(variants, -1, queries.shape[-1]) for size, queries in passes
        ]
        return torch.cat(tokens, dim=-1)

    def _aligned(self, video: torch.Tensor | None, audio: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Both as [variants, frames, 32, channels]; a frame of sound fills 25 of its 32 places."""
        hidden = self.norm.normalized_shape[0] // 3
        if video is None:
            video = audio.new_zeros(audio.shape[0], 0, self.frame_size, hidden)
        if audio is None:
            audio = video.new_zeros(video.shape[0], 0, self.speech_size, 2 * hidden)
        frames = max(video.shape[1], audio.shape[1])
        video = F.pad(video, (0, 0, 0, 0, 0, frames - video.shape[1]))
        audio = F.pad(audio, (0, 0, 0, self.frame_size - self.speech_size, 0, frames - audio.shape[1]))
        return video, audio

    def _run(self, joined: torch.Tensor, is_real: torch.Tensor, group: int, queries: torch.Tensor) -> torch.Tensor:
        """One pass: [variants, frames, 32, width] -> [variants * groups, queries, hidden]."""
        variants, frames, places, width = joined.shape
        features = self.norm(joined.reshape(-1, group * places, width))
        features = features + self.position_embedding.weight[: group * places]
        hidden = self.query_norm(queries.expand(features.shape[0], -1, -1))
        # Half of the least number: a score is added to it, and float16 must not overflow.
        lowest = torch.finfo(features.dtype).min / 2
        # Within a group a frame attends to itself and to the later ones: the published model was trained that way.
        frame = torch.arange(group, device=joined.device).repeat_interleave(places)
        causal = torch.zeros((), dtype=features.dtype, device=joined.device).masked_fill(
            frame[None] < frame[:, None], lowest
        )
        # Frames that only fill up the last group: features may look at them, queries may not.
        filler = ~is_real.view(-1, 1, group, 1).expand(-1, 1, -1, places).reshape(-1, 1, 1, group * places)
        padding = torch.zeros_like(filler, dtype=features.dtype).masked_fill(filler, lowest).repeat(variants, 1, 1, 1)
        for layer in self.layers:
            hidden = layer(hidden, features, causal[None, None], padding)
        return hidden


class JointQFormerLayer(nn.Module):
    """Attention among the features, attention among the queries, attention of queries to features, MLP.

    The features that a layer has mixed are its own: the next layer starts from the joined frames again.
    """

    def __init__(self, config: InstructBlipQFormerConfig) -> None:
        super().__init__()
        config, of_features = copy.deepcopy(config), copy.deepcopy(config)
        of_features.hidden_size = config.encoder_hidden_size
        config._attn_implementation = of_features._attn_implementation = "sdpa"
        self.feature_attention = InstructBlipQFormerAttention(of_features)
        self.attention = InstructBlipQFormerAttention(config)
        self.crossattention = InstructBlipQFormerAttention(config, is_cross_attention=True)
        self.intermediate_query = InstructBlipQFormerIntermediate(config)
        self.output_query = InstructBlipQFormerOutput(config)

    def forward(
        self, hidden: torch.Tensor, features: torch.Tensor, causal: torch.Tensor, padding: torch.Tensor
    ) -> torch.Tensor:
        """hidden [groups, queries, hidden], features [groups, places, width]; masks are added to scores."""
        features = self.feature_attention(features, attention_mask=causal)
        hidden = self.attention(hidden)
        hidden = self.crossattention(hidden, encoder_hidden_states=features, encoder_attention_mask=padding)
        return self.output_query(self.intermediate_query(hidden), hidden)

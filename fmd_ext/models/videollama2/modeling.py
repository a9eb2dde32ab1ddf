"""VideoLLaMA2 (arXiv 2406.07476): a text decoder that gets clips as video positions, then audio positions.

Modules are named as in the official code, so published checkpoints load as they are; transformers itself knows that
SigLIP's and CLIP's weights were once saved one level deeper.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import (
    MistralModel,
    MistralPreTrainedModel,
    PreTrainedModel,
    Qwen2Model,
    Qwen2PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from fmd_ext.compat import cache_kwargs, takes_cache
from fmd_ext.models.beats import Beats
from fmd_ext.models.generation import EmbeddingsGenerationMixin, refuse_beside_embeds
from fmd_ext.models.llava import VisionTower, mlp
from fmd_ext.models.loading import CompleteCheckpoints
from fmd_ext.models.videollama2.configuration import VideoLlama2MistralConfig, VideoLlama2Qwen2Config
from fmd_ext.models.videollama2.connector import STCConnector


class _TowersMixin:
    """Makes a transformers text decoder (``Qwen2Model``, ``MistralModel``) one with towers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        vision = config.vision_config
        if vision is None:
            raise ValueError("the configuration names no vision tower (mm_vision_tower or vision_config)")
        self.vision_tower = VisionTower(vision)
        padding = int(config.mm_projector_type == "stc_connector")
        self.mm_projector = STCConnector(vision.hidden_size, config.hidden_size, padding)
        if config.audio_config is not None:
            self.audio_tower = Beats(config.audio_config)
            self.mm_projector_a = _audio_projector(config)
        self.post_init()

    def encode_videos(self, frames: torch.Tensor) -> torch.Tensor:
        """[clips, frames, 3, height, width], normalised -> [clips, tokens, hidden_size]."""
        tower = self.vision_tower.vision_tower
        states = tower(frames.flatten(0, 1).to(tower.dtype), output_hidden_states=True).hidden_states
        patches = states[self.config.mm_vision_select_layer]
        if tower.config.model_type == "clip_vision_model":
            patches = patches[:, 1:]  # without the class token
        return self.mm_projector(patches.unflatten(0, frames.shape[:2]))

    def encode_audios(self, input_features: torch.Tensor) -> torch.Tensor:
        """[clips, filter bank frames, 128] -> [clips, tokens, hidden_size]."""
        return self.mm_projector_a(self.audio_tower(input_features)[0])


def _audio_projector(config: Any) -> nn.Module:
    kind, channels = config.mm_projector_a_type, config.audio_config.encoder_embed_dim
    if kind == "linear":
        return nn.Linear(channels, config.hidden_size)
    found = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if not found:
        raise ValueError(f"mm_projector_a_type {kind!r}: accepted are linear and mlpNx_gelu")
    return mlp(int(found[1]), channels, config.hidden_size)


class _GenerationPart(CompleteCheckpoints):
    """The model that answers: embeds ids and clips, runs the decoder, gives logits."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _no_split_modules = [
        "Qwen2DecoderLayer",
        "MistralDecoderLayer",
        "SiglipEncoderLayer",
        "CLIPEncoderLayer",
        "BeatsLayer",
        "Bottleneck",
    ]
    # SigLIP's pooling head, what CLIP once saved, and the table that every layer of the official BEATs repeats.
    _keys_to_ignore_on_load_unexpected = [
        r"vision_tower\.(vision_model\.)?head\.",
        r"embeddings\.position_ids$",
        *Beats._keys_to_ignore_on_load_unexpected,
    ]
    # BEATs' classifier: no feature passes through it.
    _keys_to_ignore_on_load_missing = [r"audio_tower\.predictor\."]
    input_modalities = ("video", "audio", "text")
    features = ("pixel_values_videos", "input_features")
    text_model: type[PreTrainedModel]  # of self.model

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.text_model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `Qwen2ForCausalLM`, with clips.

        Args:
            input_ids: [batch, length]; each clip is ``num_video_tokens`` placeholders, then those of its sound.
            pixel_values_videos: [batch, clips, frames, 3, height, width], normalised. A sample with fewer clips has
                them first; what follows is not looked at.
            input_features: [batch, sounds, filter bank frames, 128], likewise.

        Raises:
            ValueError: placeholders and features do not match, or features beside ``inputs_embeds``.
        """
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids, pixel_values_videos, input_features)
        else:
            refuse_beside_embeds(pixel_values_videos=pixel_values_videos, input_features=input_features)
        return self._answer(
            self.model,
            labels,
            logits_to_keep,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **cache_kwargs(cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def _embed(
        self, input_ids: torch.Tensor, frames: torch.Tensor | None, input_features: torch.Tensor | None
    ) -> torch.Tensor:
        embeds = self.get_input_embeddings()(input_ids)
        if frames is not None:
            each = self.config.num_video_tokens
            clips = _used(frames, input_ids == self.config.video_token_id, each, "video")
            embeds = _placed(embeds, input_ids == self.config.video_token_id, self.model.encode_videos(clips))
        if input_features is not None:
            if self.config.audio_config is None:
                raise ValueError("input_features were given, and this model has no audio tower")
            each = self.config.num_audio_tokens(input_features.shape[2])
            sounds = _used(input_features, input_ids == self.config.audio_token_id, each, "audio")
            embeds = _placed(embeds, input_ids == self.config.audio_token_id, self.model.encode_audios(sounds))
        return embeds


def _used(given: torch.Tensor, placeholders: torch.Tensor, each: int, name: str) -> torch.Tensor:
    """The clips [n, ...] of ``given`` [batch, clips, ...] that the samples' placeholders [batch, length] stand for."""
    counts = placeholders.sum(1)
    if given.shape[0] != len(counts) or bool((counts % each).any()) or int(counts.max()) > each * given.shape[1]:
        raise ValueError(
            f"the prompts hold {counts.tolist()} {name} placeholders, the inputs {given.shape[1]} clips for each of "
            f"{given.shape[0]} samples, of {each} placeholders each"
        )
    return given[torch.arange(given.shape[1], device=given.device) < (counts.to(given.device) // each)[:, None]]


def _placed(embeds: torch.Tensor, placeholders: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Features [clips, tokens, hidden] in the place of the placeholders' embeddings, in order."""
    return embeds.masked_scatter(placeholders[..., None].to(embeds.device), features.to(embeds.device, embeds.dtype))


class VideoLlama2Qwen2Model(_TowersMixin, Qwen2Model):
    """Qwen2's decoder with towers."""

    config_class = VideoLlama2Qwen2Config


class VideoLlama2Qwen2ForConditionalGeneration(_GenerationPart, Qwen2PreTrainedModel, EmbeddingsGenerationMixin):
    """VideoLLaMA2.1 (Qwen2), with audio (VideoLLaMA2.1-7B-AV) or without."""

    config_class = VideoLlama2Qwen2Config
    text_model = VideoLlama2Qwen2Model


class VideoLlama2MistralModel(_TowersMixin, MistralModel):
    """Mistral's decoder with towers."""

    config_class = VideoLlama2MistralConfig


class VideoLlama2MistralForConditionalGeneration(_GenerationPart, MistralPreTrainedModel, EmbeddingsGenerationMixin):
    """VideoLLaMA2 (Mistral), with audio or without."""

    config_class = VideoLlama2MistralConfig
    text_model = VideoLlama2MistralModel

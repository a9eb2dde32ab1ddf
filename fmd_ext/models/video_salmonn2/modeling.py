"""video-SALMONN 2 (arXiv 2506.15220): Qwen2 reads each frame of a clip, and behind it a share of the sound.

Modules are named as in the official code, so checkpoints in its layout load as they are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import Qwen2Model, Qwen2PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils.generic import can_return_tuple

from fmd_ext.compat import cache_kwargs, takes_cache
from fmd_ext.models.generation import EmbeddingsGenerationMixin, refuse_beside_embeds
from fmd_ext.models.llava import VisionTower, mlp
from fmd_ext.models.loading import CompleteCheckpoints
from fmd_ext.models.video_salmonn2.configuration import VideoSalmonn2Config
from fmd_ext.models.windowed_sound import WindowedQFormer

_POOLS = {"max": nn.functional.max_pool2d, "average": nn.functional.avg_pool2d}


class VideoSalmonn2Model(Qwen2Model):
    """Qwen2's decoder, with the tower that sees."""

    config_class = VideoSalmonn2Config

    def __init__(self, config: VideoSalmonn2Config) -> None:
        super().__init__(config)
        self.vision_tower = VisionTower(config.vision_config)
        self.mm_projector = mlp(2, config.vision_config.hidden_size, config.hidden_size)
        self.image_newline = nn.Parameter(torch.randn(config.hidden_size) / math.sqrt(config.hidden_size))
        self.post_init()

    def encode_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """[frames, 3, height, width], normalised -> [frames, num_frame_tokens, hidden_size], row by row of patches."""
        tower = self.vision_tower.vision_tower
        # Not the tower's own output: that has passed a norm which the model was trained without.
        patches = tower.encoder(inputs_embeds=tower.embeddings(frames.to(tower.dtype))).last_hidden_state
        position = self.config.mm_pooling_position
        if position == "before":
            patches = self._pooled(patches)
        patches = self.mm_projector(patches)
        if position == "after":
            patches = self._pooled(patches)
        side = math.isqrt(patches.shape[1])
        rows = patches.unflatten(1, (side, side))
        newlines = self.image_newline.to(rows).expand(*rows.shape[:2], 1, -1)
        return torch.cat([rows, newlines], dim=2).flatten(1, 2)

    def _pooled(self, patches: torch.Tensor) -> torch.Tensor:
        """[frames, patches, channels]; a row and a column that are left over at the edge are dropped."""
        side = math.isqrt(patches.shape[1])
        grid = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        pooled = _POOLS[self.config.mm_spatial_pool_mode](grid, self.config.mm_spatial_pool_stride)
        return pooled.flatten(2).transpose(1, 2)


class VideoSalmonn2ForConditionalGeneration(CompleteCheckpoints, Qwen2PreTrainedModel, EmbeddingsGenerationMixin):
    """The model that answers: embeds ids and clips, runs the decoder, gives logits."""

    config_class = VideoSalmonn2Config
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _no_split_modules = ["Qwen2DecoderLayer", "SiglipEncoderLayer", "WhisperEncoderLayer", "WindowedQFormer"]
    # SigLIP's pooling head, and positions that the official Q-Former counts but does not use.
    _keys_to_ignore_on_load_unexpected = [r"vision_tower\.(vision_model\.)?head\.", r"embeddings\.position_ids$"]
    input_modalities = ("video", "audio", "text")
    features = ("pixel_values_videos", "input_features", "sound_order")

    def __init__(self, config: VideoSalmonn2Config) -> None:
        super().__init__(config)
        self.model = VideoSalmonn2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.speech_encoder = WhisperEncoder(config.audio_config)
        self.ln_speech = nn.LayerNorm(config.audio_config.d_model)
        width = config.qformer_config.hidden_size
        self.speech_Qformer = WindowedQFormer(config.qformer_config)
        queries = torch.randn(1, config.num_speech_query_token, width) * config.qformer_config.initializer_range
        self.speech_query_tokens = nn.Parameter(queries)
        self.speech_llama_proj = nn.Linear(width, config.hidden_size)
        self.final_linear = mlp(2, config.hidden_size, config.hidden_size) if config.use_final_linear else None
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
        sound_order: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `Qwen2ForCausalLM`, with clips; `VideoSalmonn2Processor` makes the arguments.

        Args:
            input_ids: [batch, length], with placeholders where frames and sound go: ``num_frame_tokens`` per frame.
            pixel_values_videos: [batch, frames, 3, height, width], normalised. A sample with fewer frames has them
                first; what follows is not looked at.
            input_features: [batch, windows, mel bins, frames], Whisper's windows of 30 s, likewise.
            sound_order: int64 [batch, most placeholders of sound]: which of a sound's tokens stands at each of its
                placeholders. What follows a sample's own is not looked at.

        Raises:
            ValueError: placeholders and features do not match, or features beside ``inputs_embeds``.
        """
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids, pixel_values_videos, input_features, sound_order)
        else:
            refuse_beside_embeds(
                pixel_values_videos=pixel_values_videos, input_features=input_features, sound_order=sound_order
            )
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

    def encode_sound(self, features: torch.Tensor) -> torch.Tensor:
        """Windows of one sound [windows, mel bins, frames] -> [windows, num_sound_tokens, hidden_size]."""
        states = self.ln_speech(self.speech_encoder(features.to(self.speech_encoder.dtype)).last_hidden_state)
        tokens = self.speech_Qformer(states, self.speech_query_tokens, *self.config.sound_window)
        tokens = self.speech_llama_proj(tokens)
        if self.final_linear is not None:
            tokens = self.final_linear(tokens)
        return tokens + _window_positions(len(tokens), tokens.shape[-1])[:, None].to(tokens)

    def _embed(
        self,
        input_ids: torch.Tensor,
        frames: torch.Tensor | None,
        features: torch.Tensor | None,
        order: torch.Tensor | None,
    ) -> torch.Tensor:
        embeds = self.get_input_embeddings()(input_ids)
        if frames is not None:
            embeds = embeds.masked_fill((input_ids == self.config.blank_token_id)[..., None].to(embeds.device), 0)
            places = input_ids == self.config.video_token_id
            tokens = self.model.encode_frames(self._seen(frames, places))
            embeds = embeds.masked_scatter(places[..., None].to(embeds.device), tokens.to(embeds))
        if features is not None:
            places = input_ids == self.config.audio_token_id
            for sample, own in enumerate(self._heard(features, order, places)):
                embeds[sample, places[sample].to(embeds.device)] = own.to(embeds)
        return embeds

    def _seen(self, frames: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The frames [n, ...] of ``frames`` [batch, most, ...] that the samples' placeholders stand for."""
        counts, each = places.sum(1), self.config.num_frame_tokens
        if len(frames) != len(counts) or bool((counts % each).any()) or int(counts.max()) > each * frames.shape[1]:
            raise ValueError(
                f"the prompts hold {counts.tolist()} video placeholders, the inputs {frames.shape[1]} frames for each "
                f"of {len(frames)} samples, of {each} placeholders each"
            )
        return frames[torch.arange(frames.shape[1], device=frames.device) < (counts.to(frames.device) // each)[:, None]]

    def _heard(self, features: torch.Tensor, order: torch.Tensor | None, places: torch.Tensor) -> list[torch.Tensor]:
        """Per sample the tokens [placeholders, hidden_size] of its sound, in their order."""
        counts, each = places.sum(1).tolist(), self.config.num_sound_tokens
        if order is None or not len(features) == len(order) == len(counts) or max(counts) > order.shape[1]:
            raise ValueError(
                f"the prompts hold {counts} audio placeholders, input_features are {list(features.shape)} and "
                f"sound_order {'None' if order is None else list(order.shape)}: both are needed, for every sample"
            )
        heard = []
        for sample, (windows, own) in enumerate(zip(features, order, strict=True)):
            own = own[: counts[sample]]
            used = int(own.max()) // each + 1 if len(own) else 0
            if used > len(windows):
                raise ValueError(
                    f"sound_order of sample {sample} asks for token {int(own.max())}, its {len(windows)} windows of "
                    f"sound have {each} tokens each"
                )
            if used:
                heard.append(self.encode_sound(windows[:used]).flatten(0, 1)[own])
            else:
                heard.append(features.new_zeros(0, self.config.hidden_size))
        return heard


def _window_positions(count: int, channels: int) -> torch.Tensor:
    """float32 [count, channels]: zero for the first window of a sound, then sinusoids of positions 0, 1, ..."""
    position = torch.arange(count - 1, dtype=torch.float32)[:, None]
    steps = torch.exp(torch.arange(0, channels, 2, dtype=torch.float32) * (-math.log(10000.0) / channels))
    out = torch.zeros(count, channels)
    out[1:, 0::2] = torch.sin(position * steps)
    out[1:, 1::2] = torch.cos(position * steps)
    return out

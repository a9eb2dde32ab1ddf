"""Qwen2.5-Omni: the thinker alone, or the full model (whose talker reads the thinker's hidden states)."""

from __future__ import annotations

from .base import Adapter, TokenSource

QWEN2_5_OMNI = Adapter(
    name="Qwen2.5-Omni",
    model_types=("qwen2_5_omni", "qwen2_5_omni_thinker"),
    entry=("thinker", ""),
    decoder=("model.language_model", "model"),  # transformers >= 5.18, before
    sources=(
        TokenSource("visual", "image_token_id", ("pixel_values", "mm_encoder_outputs.image")),
        TokenSource("visual", "video_token_id", ("pixel_values_videos", "mm_encoder_outputs.video")),
        TokenSource("audio", "audio_token_id", ("input_features", "mm_encoder_outputs.audio")),
    ),
    rotary="apply_rotary_pos_emb",
)

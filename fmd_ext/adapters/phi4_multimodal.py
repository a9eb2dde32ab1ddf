"""Phi-4-multimodal: images and speech. Its decoder takes token ids and features itself."""

from __future__ import annotations

from .base import Adapter, TokenSource

PHI4_MULTIMODAL = Adapter(
    name="Phi-4-multimodal",
    model_types=("phi4_multimodal",),
    entry=("",),
    decoder=("model",),
    sources=(
        TokenSource("visual", "vision_config.image_token_id", ("image_pixel_values",)),
        TokenSource("audio", "audio_config.audio_token_id", ("audio_input_features",)),
    ),
    embed="embed_tokens_extend",
)

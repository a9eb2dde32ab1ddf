"""VideoLLaMA2, on Qwen2 (2.1) or Mistral, with audio: each clip's video positions, then its audio positions."""

from __future__ import annotations

from .base import Adapter, TokenSource

VIDEOLLAMA2 = Adapter(
    name="VideoLLaMA2",
    model_types=("videollama2_qwen2", "videollama2_mistral"),
    entry=("",),
    decoder=("model",),
    sources=(
        TokenSource("visual", "video_token_id", ("pixel_values_videos",)),
        TokenSource("audio", "audio_token_id", ("input_features",)),
    ),
    rotary="apply_rotary_pos_emb",
)

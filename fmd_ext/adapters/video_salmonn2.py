"""video-SALMONN 2: each frame's positions, then its share of the sound's."""

from __future__ import annotations

from .base import Adapter, TokenSource

VIDEO_SALMONN2 = Adapter(
    name="video-SALMONN 2",
    model_types=("video_salmonn_2",),
    entry=("",),
    decoder=("model",),
    sources=(
        TokenSource("visual", "video_token_id", ("pixel_values_videos",)),
        TokenSource("audio", "audio_token_id", ("input_features",)),
    ),
    rotary="apply_rotary_pos_emb",
)

"""video-SALMONN 2+: Qwen2.5-VL that hears; the sound of a clip stands between the tokens of its frames."""

from __future__ import annotations

from .base import Adapter, TokenSource

VIDEO_SALMONN2_PLUS = Adapter(
    name="video-SALMONN 2+",
    model_types=("video_salmonn2_plus",),
    entry=("",),
    decoder=("model.language_model",),
    sources=(
        TokenSource("visual", "image_token_id", ("pixel_values", "mm_encoder_outputs.image")),
        TokenSource("visual", "video_token_id", ("pixel_values_videos", "mm_encoder_outputs.video")),
        TokenSource("audio", "audio_token_id", ("input_features",)),
    ),
    rotary="apply_rotary_pos_emb",
)

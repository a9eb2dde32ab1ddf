"""video-SALMONN: every audio-visual token mixes picture and sound, so a modality is masked before they are joined."""

from __future__ import annotations

from .base import Adapter, TokenSource

VIDEO_SALMONN = Adapter(
    name="video-SALMONN",
    model_types=("video_salmonn",),
    entry=("",),
    decoder=("language_model",),
    sources=(
        TokenSource("visual", "video_token_id", ("pixel_values",)),
        TokenSource("audio", "audio_token_id", ("input_features",)),
        TokenSource("joint", "joint_token_id", ("pixel_values",)),
    ),
    branch_inputs="branch_inputs",
    rotary="apply_rotary_pos_emb",
)

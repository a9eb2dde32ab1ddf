"""The published configuration of video-SALMONN 2: Qwen2's, flat, with settings of the towers beside it."""

from __future__ import annotations

from typing import Any

from transformers import InstructBlipQFormerConfig, PreTrainedConfig, Qwen2Config, SiglipVisionConfig, WhisperConfig

from fmd_ext.models.windowed_sound import num_windows, window_frames

# The official code names its towers; these are their shapes.
_TOWERS: dict[str, dict[str, Any]] = {
    # SigLIP so400m-patch14-384 without its last layer, which is not run
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
    # Whisper large v3
    "audio_config": {
        "d_model": 1280,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "num_mel_bins": 128,
    },
    # bert-base-uncased, two layers
    "qformer_config": {"num_hidden_layers": 2, "cross_attention_frequency": 1},
}
# Settings that the official code keeps under ``model_args``, where they overrule those beside it.
_MODEL_ARGS = (
    "mm_projector_type",
    "mm_spatial_pool_mode",
    "mm_spatial_pool_stride",
    "mm_pooling_position",
    "mm_newline_position",
    "num_speech_query_token",
    "window_level_Qformer",
    "second_per_window",
    "second_stride",
    "use_final_linear",
    "add_time_token",
)
_ACCEPTED = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_spatial_pool_mode": ("max", "average"),
    "mm_pooling_position": ("after", "before", "no"),
    "mm_newline_position": ("grid",),
    "window_level_Qformer": (True,),
}


class VideoSalmonn2Config(Qwen2Config):
    """Configuration of `VideoSalmonn2ForConditionalGeneration`; the defaults are those of the released scripts.

    Args:
        vision_config: SigLIP's, with the layers that are run; its patches are those of a square frame.
        audio_config: Whisper's, of which the encoder is used.
        qformer_config: of the Q-Former that reads Whisper's states; its ``encoder_hidden_size`` follows from Whisper.
        mm_projector_type: between SigLIP and the decoder.
        mm_spatial_pool_mode, mm_spatial_pool_stride, mm_pooling_position: how patches are pooled, and whether that is
            after the projector, before it, or not at all.
        mm_newline_position: a learned token behind every row of patches ("grid").
        num_speech_query_token: tokens per window of sound.
        second_per_window, second_stride: length and distance of the windows, in seconds.
        use_final_linear: whether an MLP follows the sound's projection.
        add_time_token: whether the time is written behind each frame of a clip without sound.
        video_token_id, audio_token_id: ids that stand for picture and sound in a prompt. No text is tokenized to them.
        blank_token_id: an id whose embedding is zero, which fills up shorter times.
    """

    model_type = "video_salmonn_2"
    sub_configs = {
        "vision_config": SiglipVisionConfig,
        "audio_config": WhisperConfig,
        "qformer_config": InstructBlipQFormerConfig,
    }

    vision_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    mm_projector_type: str = "mlp2x_gelu"
    mm_spatial_pool_mode: str = "max"
    mm_spatial_pool_stride: int = 2
    mm_pooling_position: str = "after"
    mm_newline_position: str = "grid"
    num_speech_query_token: int = 1
    window_level_Qformer: bool = True
    second_per_window: float = 0.5
    second_stride: float = 0.5
    use_final_linear: bool = True
    add_time_token: bool = True
    video_token_id: int | None = None
    audio_token_id: int | None = None
    blank_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        model_args = kwargs.pop("model_args", None) or {}
        for name in _MODEL_ARGS:
            said = model_args.get(name, getattr(self, name))
            setattr(self, name, getattr(VideoSalmonn2Config, name) if said is None else said)
        for name, accepted in _ACCEPTED.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} {getattr(self, name)!r}: accepted are {', '.join(map(str, accepted))}")
        for name, config_class in self.sub_configs.items():
            given = getattr(self, name)
            if not isinstance(given, PreTrainedConfig):
                setattr(self, name, config_class(**(_TOWERS[name] if given is None else given)))
        self.vision_config.vision_use_head = False  # no feature passes through SigLIP's pooling head
        self.qformer_config.encoder_hidden_size = self.audio_config.d_model
        # Rows that the embedding has beyond the tokenizer's vocabulary.
        for row, name in enumerate(("audio_token_id", "video_token_id", "blank_token_id"), start=1):
            if getattr(self, name) is None:
                setattr(self, name, self.vocab_size - row)
        super().__post_init__(**kwargs)

    @property
    def num_frame_tokens(self) -> int:
        """Positions that a frame takes: the pooled patches, and the token behind every row of them."""
        side = self.vision_config.image_size // self.vision_config.patch_size
        if self.mm_pooling_position != "no":
            side //= self.mm_spatial_pool_stride
        return side * (side + 1)

    @property
    def sound_window(self) -> tuple[int, int]:
        """Length and distance of the Q-Former's windows, in Whisper's states."""
        return window_frames(self.second_per_window), window_frames(self.second_stride)

    @property
    def num_sound_tokens(self) -> int:
        """Tokens that the Q-Former makes of each of Whisper's windows (30 s)."""
        return num_windows(self.audio_config.max_source_positions, *self.sound_window) * self.num_speech_query_token

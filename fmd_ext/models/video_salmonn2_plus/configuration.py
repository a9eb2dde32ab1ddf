"""The published configuration of video-SALMONN 2+: Qwen2.5-VL's, with a sound encoder's beside it."""

from __future__ import annotations

from typing import Any

from transformers import InstructBlipQFormerConfig, PreTrainedConfig, Qwen2_5_VLConfig, WhisperConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig

from fmd_ext.models.windowed_sound import num_windows, window_frames

from .positions import SCHEMES

# The official class. Published configurations call themselves qwen2_5_vl, as those of plain Qwen2.5-VL do.
OFFICIAL_CLASS = "video_SALMONN2_plus"

# Published name -> that of transformers' Q-Former.
_QFORMER_NAMES = {"cross_attention_freq": "cross_attention_frequency"}
_QFORMER = {"hidden_size": 3072, "num_hidden_layers": 2, "intermediate_size": 12288, "cross_attention_frequency": 1}


def _settings(published: dict[str, Any]) -> dict[str, Any]:
    """Without the type that a published part borrows, and without null, which stands for a default of its time."""
    return {name: value for name, value in published.items() if value is not None and name != "model_type"}


class VideoSalmonn2PlusAudioConfig(WhisperConfig):
    """Whisper's encoder (that of large v3, where nothing else is given) and the Q-Former that reads its windows.

    Args:
        qformer_config: its ``encoder_hidden_size`` follows from ``d_model``.
        query_length: tokens per window.
        second_per_window, second_stride: seconds of a window, and from one to the next.
        out_hidden_size: of the text decoder.
    """

    model_type = "video_salmonn2_plus_audio"
    base_config_key = "audio_config"
    sub_configs = {"qformer_config": InstructBlipQFormerConfig}

    num_mel_bins: int = 128
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    d_model: int = 1280
    qformer_config: dict | PreTrainedConfig | None = None
    query_length: int = 1
    second_per_window: float = 0.5
    second_stride: float = 0.5
    out_hidden_size: int = 3584

    def __post_init__(self, **kwargs: Any) -> None:
        given = {} if self.qformer_config is None else self.qformer_config
        if isinstance(given, dict):
            given = {_QFORMER_NAMES.get(name, name): value for name, value in given.items()}
            self.query_length = given.pop("query_length", self.query_length)
            self.qformer_config = InstructBlipQFormerConfig(**{**_QFORMER, **_settings(given)})
        self.qformer_config.encoder_hidden_size = self.d_model
        super().__post_init__(**kwargs)

    @property
    def window(self) -> tuple[int, int]:
        """Length and distance of windows in Whisper's states."""
        return window_frames(self.second_per_window), window_frames(self.second_stride)

    @property
    def num_tokens(self) -> int:
        """Tokens of one log-mel window of 30 s."""
        return num_windows(self.max_source_positions, *self.window) * self.query_length


class VideoSalmonn2PlusConfig(Qwen2_5_VLConfig):
    """Qwen2.5-VL's configuration with that of the sound's encoder.

    Args:
        audio_config: see `VideoSalmonn2PlusAudioConfig`.
        audio_token_id: the id that stands for sound in a prompt: that of ``<|audio_pad|>``.
        mrope_positions: ``"inference"``, as the released code counts positions when it answers, or ``"training"``, as
            it counts them in training; see `positions`.
    """

    model_type = "video_salmonn2_plus"
    sub_configs = {
        "vision_config": Qwen2_5_VLVisionConfig,
        "text_config": Qwen2_5_VLTextConfig,
        "audio_config": VideoSalmonn2PlusAudioConfig,
    }

    audio_config: dict | PreTrainedConfig | None = None
    audio_token_id: int = 151665
    mrope_positions: str = "inference"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.mrope_positions not in SCHEMES:
            raise ValueError(f"mrope_positions {self.mrope_positions!r}: accepted are {', '.join(SCHEMES)}")
        if not isinstance(self.audio_config, PreTrainedConfig):
            self.audio_config = VideoSalmonn2PlusAudioConfig(**_settings(self.audio_config or {}))
        super().__post_init__(**kwargs)
        self.audio_config.out_hidden_size = self.text_config.hidden_size

    @classmethod
    def get_config_dict(cls, source: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads the settings; those of the official class are taken for ours."""
        settings, kwargs = super().get_config_dict(source, **kwargs)
        if OFFICIAL_CLASS in (settings.get("architectures") or ()):
            settings = {**settings, "model_type": cls.model_type}
        return settings, kwargs

"""The shape of a video-SALMONN model."""

from __future__ import annotations

from typing import Any

from transformers import (
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    PreTrainedConfig,
    WhisperConfig,
)

from fmd_ext.models.beats import BeatsConfig

# What the published checkpoint has, where it differs from the classes' defaults.
_DEFAULTS: dict[str, dict[str, Any]] = {
    # Vicuna-13B v1.5
    "text_config": {
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "vision_config": {"layer_norm_eps": 1e-6},
    # bert-base-uncased and the token [DEC]
    "qformer_config": {"vocab_size": 30523},
    # Whisper large v2
    "speech_config": {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120},
    "beats_config": {},
    "joint_qformer_config": {"num_hidden_layers": 2, "cross_attention_frequency": 1, "encoder_hidden_size": 2304},
}


class VideoSalmonnConfig(PreTrainedConfig):
    """Configuration of `VideoSalmonnForConditionalGeneration`; the defaults are the published checkpoint's.

    Args:
        text_config: the Llama decoder.
        vision_config, qformer_config: InstructBLIP's image encoder and its Q-Former, which reads the question.
        speech_config, beats_config: Whisper's encoder and BEATs.
        joint_qformer_config: the causal Q-Former over joined frames; its ``encoder_hidden_size`` is three times the
            ``hidden_size`` of ``qformer_config`` (picture, speech, sound), its vocabulary is not used.
        num_query_tokens: tokens per frame of picture.
        speech_tokens_per_frame: Whisper (and BEATs) tokens that are joined to a frame: 25, half a second.
        frames_per_group, num_joint_queries: frames that the joint Q-Former sees at once (10), and the tokens that it
            makes of them (30).
        fine_frames_per_group: the same for its second, finer pass (1 frame); the tokens are proportionally fewer, so
            that both passes give equally many.
        max_group_positions: rows of the table of positions within a group.
        video_token_id, audio_token_id, joint_token_id: placeholders in ``input_ids`` for tokens made of picture alone,
            of sound alone, of both. The bytes 0 to 2 of Llama's vocabulary, which no text holds.
    """

    model_type = "video_salmonn"
    sub_configs = {
        "text_config": LlamaConfig,
        "vision_config": InstructBlipVisionConfig,
        "qformer_config": InstructBlipQFormerConfig,
        "speech_config": WhisperConfig,
        "beats_config": BeatsConfig,
        "joint_qformer_config": InstructBlipQFormerConfig,
    }

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    speech_config: dict | PreTrainedConfig | None = None
    beats_config: dict | PreTrainedConfig | None = None
    joint_qformer_config: dict | PreTrainedConfig | None = None
    num_query_tokens: int = 32
    speech_tokens_per_frame: int = 25
    frames_per_group: int = 10
    num_joint_queries: int = 30
    fine_frames_per_group: int = 1
    max_group_positions: int = 4096
    video_token_id: int = 3
    audio_token_id: int = 4
    joint_token_id: int = 5
    bos_token_id: int = 1
    eos_token_id: int = 2
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        for name, config_class in self.sub_configs.items():
            given = getattr(self, name)
            if given is None:
                given = _DEFAULTS[name]
            if isinstance(given, dict):
                setattr(self, name, config_class(**given))
        self.qformer_config.encoder_hidden_size = self.vision_config.hidden_size
        super().__post_init__(**kwargs)
        width = 3 * self.qformer_config.hidden_size
        if self.joint_qformer_config.encoder_hidden_size != width:
            raise ValueError(
                f"joint_qformer_config.encoder_hidden_size must be {width}, three times the hidden_size of "
                f"qformer_config, got {self.joint_qformer_config.encoder_hidden_size}"
            )
        if self.frames_per_group % self.fine_frames_per_group or self.num_fine_queries < 1:
            raise ValueError(
                f"fine_frames_per_group={self.fine_frames_per_group} must divide frames_per_group="
                f"{self.frames_per_group} and leave at least one of num_joint_queries={self.num_joint_queries}"
            )

    @property
    def num_fine_queries(self) -> int:
        """Tokens per fine group: as many per frame as the coarse pass gives."""
        return self.num_joint_queries * self.fine_frames_per_group // self.frames_per_group

    @property
    def audio_frames(self) -> int:
        """Frames that the sound of a clip fills, always: Whisper pads it to its whole window."""
        return self.speech_config.max_source_positions // self.speech_tokens_per_frame

    def num_tokens(self, frames: int, has_audio: bool) -> int:
        """Placeholders of a clip with so many frames of picture (0: none) and with or without sound."""
        frames = max(frames, self.audio_frames if has_audio else 0)
        return -(-frames // self.frames_per_group) * self.num_joint_queries

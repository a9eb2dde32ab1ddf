"""The published configuration of VideoLLaMA2: the text decoder's own, flat, with the towers' settings beside it."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, MistralConfig, PreTrainedConfig, Qwen2Config, SiglipVisionConfig

from fmd_ext.models.beats import BeatsConfig

CONNECTORS = ("stc_connector", "stc_connector_v35")

# Published configurations name the vision tower only. What that name means:
_VISION_TOWERS = {
    "siglip-so400m-patch14-384": lambda: SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    ),
    "clip-vit-large-patch14-336": lambda: CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    ),
}


@dataclasses.dataclass(kw_only=True)
class _Towers:
    """What VideoLLaMA2 adds to a text decoder's configuration.

    Args:
        mm_vision_tower: hub name of the vision tower; decides ``vision_config`` where that is not given.
        vision_config: SigLIP's or CLIP's.
        mm_vision_select_layer: which of the tower's hidden states is used.
        mm_projector_type: one of ``CONNECTORS``.
        mm_audio_tower: whether there is an audio tower: None for models that only see.
        audio_config: BEATs'; where not given the shape that all published models have.
        mm_projector_a_type: ``mlpNx_gelu`` or ``linear``, between BEATs and the decoder.
        num_frames: frames of a clip.
        video_token_id, audio_token_id: ids that stand for picture and sound in a prompt. No text is tokenized to them.
    """

    mm_vision_tower: str | None = None
    vision_config: dict | PreTrainedConfig | None = None
    mm_vision_select_layer: int = -2
    mm_projector_type: str = "stc_connector_v35"
    mm_audio_tower: str | None = None
    audio_config: dict | PreTrainedConfig | None = None
    mm_projector_a_type: str = "mlp2x_gelu"
    num_frames: int = 8
    video_token_id: int | None = None
    audio_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_config is None and self.mm_vision_tower is not None:
            short = self.mm_vision_tower.rstrip("/").rsplit("/", 1)[-1]
            if short not in _VISION_TOWERS:
                raise ValueError(
                    f"mm_vision_tower {self.mm_vision_tower!r} is not known; accepted are {', '.join(_VISION_TOWERS)}, "
                    "or any SigLIP or CLIP given as vision_config"
                )
            self.vision_config = _VISION_TOWERS[short]()
        elif isinstance(self.vision_config, dict):
            self.vision_config = AutoConfig.for_model(**self.vision_config)
        if getattr(self.vision_config, "model_type", None) == "siglip_vision_model":
            self.vision_config.vision_use_head = False  # no feature passes through SigLIP's pooling head
        if isinstance(self.audio_config, dict):
            self.audio_config = BeatsConfig(**self.audio_config)
        elif self.audio_config is None and self.mm_audio_tower is not None:
            self.audio_config = BeatsConfig(weight_norm_eps=1e-6)
        if self.mm_projector_type not in CONNECTORS:
            raise ValueError(f"mm_projector_type {self.mm_projector_type!r}: accepted are {', '.join(CONNECTORS)}")
        super().__post_init__(**kwargs)

    @property
    def num_video_tokens(self) -> int:
        """Positions that one clip's picture takes: the connector halves time, height and width."""
        side = self.vision_config.image_size // self.vision_config.patch_size
        pad = 2 if self.mm_projector_type == "stc_connector" else 0
        return ((self.num_frames + pad) // 2) * ((side + pad) // 2) ** 2

    def num_audio_tokens(self, frames: int) -> int:
        """Positions that ``frames`` frames of a filter bank of 128 bins take."""
        patch = self.audio_config.input_patch_size
        return (frames // patch) * (128 // patch)


class VideoLlama2Qwen2Config(_Towers, Qwen2Config):
    """VideoLLaMA2.1: Qwen2's configuration with the towers'."""

    __doc__ = f"{__doc__}\n{_Towers.__doc__}"
    model_type = "videollama2_qwen2"
    sub_configs = {"vision_config": AutoConfig, "audio_config": BeatsConfig}

    def __post_init__(self, **kwargs: Any) -> None:
        # Rows that the embedding has beyond the tokenizer's vocabulary.
        self.video_token_id = self.vocab_size - 2 if self.video_token_id is None else self.video_token_id
        self.audio_token_id = self.vocab_size - 1 if self.audio_token_id is None else self.audio_token_id
        super().__post_init__(**kwargs)


class VideoLlama2MistralConfig(_Towers, MistralConfig):
    """VideoLLaMA2: Mistral's configuration with the towers'."""

    __doc__ = f"{__doc__}\n{_Towers.__doc__}"
    model_type = "videollama2_mistral"
    sub_configs = {"vision_config": AutoConfig, "audio_config": BeatsConfig}

    def __post_init__(self, **kwargs: Any) -> None:
        # Its vocabulary is full: the tokens of two control characters that no prompt contains (<0x01> and <0x02>).
        self.video_token_id = 4 if self.video_token_id is None else self.video_token_id
        self.audio_token_id = 5 if self.audio_token_id is None else self.audio_token_id
        super().__post_init__(**kwargs)

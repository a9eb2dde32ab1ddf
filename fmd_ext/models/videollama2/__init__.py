"""VideoLLaMA2 as a transformers model. Importing this registers it with the Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from fmd_ext.models.videollama2.configuration import VideoLlama2MistralConfig, VideoLlama2Qwen2Config
from fmd_ext.models.videollama2.modeling import (
    VideoLlama2MistralForConditionalGeneration,
    VideoLlama2Qwen2ForConditionalGeneration,
)
from fmd_ext.models.videollama2.processing import VideoLlama2Processor

__all__ = [
    "VideoLlama2MistralConfig",
    "VideoLlama2MistralForConditionalGeneration",
    "VideoLlama2Processor",
    "VideoLlama2Qwen2Config",
    "VideoLlama2Qwen2ForConditionalGeneration",
]

for _config, _model in (
    (VideoLlama2Qwen2Config, VideoLlama2Qwen2ForConditionalGeneration),
    (VideoLlama2MistralConfig, VideoLlama2MistralForConditionalGeneration),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
    AutoModelForImageTextToText.register(_config, _model, exist_ok=True)
    AutoProcessor.register(_config, VideoLlama2Processor, exist_ok=True)

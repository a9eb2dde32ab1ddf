"""video-SALMONN 2+ as a transformers model. Importing this registers it with the Auto classes.

Published configurations call themselves ``qwen2_5_vl``, by which the Auto classes make a Qwen2.5-VL that does not hear:
load those by the classes of this package. What these save, the Auto classes know.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from .checkpoint import merge_adapter, register_names
from .configuration import OFFICIAL_CLASS, VideoSalmonn2PlusConfig
from .modeling import VideoSalmonn2PlusForConditionalGeneration
from .processing import VideoSalmonn2PlusProcessor

__all__ = [
    "OFFICIAL_CLASS",
    "VideoSalmonn2PlusConfig",
    "VideoSalmonn2PlusForConditionalGeneration",
    "VideoSalmonn2PlusProcessor",
    "merge_adapter",
]

register_names(VideoSalmonn2PlusForConditionalGeneration)
AutoConfig.register(VideoSalmonn2PlusConfig.model_type, VideoSalmonn2PlusConfig, exist_ok=True)
AutoModelForCausalLM.register(VideoSalmonn2PlusConfig, VideoSalmonn2PlusForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(VideoSalmonn2PlusConfig, VideoSalmonn2PlusForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VideoSalmonn2PlusConfig, VideoSalmonn2PlusProcessor, exist_ok=True)

"""video-SALMONN (Sun et al., ICML 2024): picture and sound joined in every token; registered with the Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from .checkpoint import is_official_folder, load_official
from .configuration import VideoSalmonnConfig
from .modeling import VideoSalmonnForConditionalGeneration
from .processing import VideoSalmonnProcessor

__all__ = [
    "VideoSalmonnConfig",
    "VideoSalmonnForConditionalGeneration",
    "VideoSalmonnProcessor",
    "is_official_folder",
    "load_official",
]

AutoConfig.register(VideoSalmonnConfig.model_type, VideoSalmonnConfig, exist_ok=True)
AutoModelForCausalLM.register(VideoSalmonnConfig, VideoSalmonnForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VideoSalmonnConfig, VideoSalmonnProcessor, exist_ok=True)

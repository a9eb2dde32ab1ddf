"""video-SALMONN 2 as a transformers model. Importing this registers it with the Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from .configuration import VideoSalmonn2Config
from .modeling import VideoSalmonn2ForConditionalGeneration
from .processing import VideoSalmonn2Processor

__all__ = ["VideoSalmonn2Config", "VideoSalmonn2ForConditionalGeneration", "VideoSalmonn2Processor"]

AutoConfig.register(VideoSalmonn2Config.model_type, VideoSalmonn2Config, exist_ok=True)
AutoModelForCausalLM.register(VideoSalmonn2Config, VideoSalmonn2ForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(VideoSalmonn2Config, VideoSalmonn2ForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VideoSalmonn2Config, VideoSalmonn2Processor, exist_ok=True)

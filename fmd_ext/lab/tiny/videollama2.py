"""Random-weight VideoLLaMA2 models of a few megabytes, for tests. What they say means nothing."""

from __future__ import annotations

import torch

from fmd_ext.lab.tiny.model import INITIALIZER_RANGE, set_generation_tokens
from fmd_ext.lab.tiny.processor import CHAT_TEMPLATE, byte_tokenizer
from fmd_ext.lab.tiny.vocabulary import TOKEN_IDS, VOCAB_SIZE
from fmd_ext.models.videollama2 import (
    VideoLlama2MistralConfig,
    VideoLlama2MistralForConditionalGeneration,
    VideoLlama2Processor,
    VideoLlama2Qwen2Config,
    VideoLlama2Qwen2ForConditionalGeneration,
)

CLASSES = {
    "qwen2": (VideoLlama2Qwen2Config, VideoLlama2Qwen2ForConditionalGeneration),
    "mistral": (VideoLlama2MistralConfig, VideoLlama2MistralForConditionalGeneration),
}


def tiny_videollama2_config(
    *,
    decoder: str = "qwen2",
    num_layers: int = 4,
    hidden_size: int = 128,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    num_frames: int = 4,
) -> VideoLlama2Qwen2Config | VideoLlama2MistralConfig:
    """The configuration of a tiny model: SigLIP with Qwen2, CLIP with Mistral, as in the published ones."""
    tower = {
        "model_type": "siglip_vision_model" if decoder == "qwen2" else "clip_vision_model",
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 70,
        "patch_size": 14,
    }
    ears = {
        "embed_dim": 32,
        "encoder_layers": 2,
        "encoder_embed_dim": 48,
        "encoder_ffn_embed_dim": 64,
        "encoder_attention_heads": 4,
        "conv_pos": 16,
        "conv_pos_groups": 4,
        "num_buckets": 32,
        "max_distance": 64,
        "predictor_class": 7,
        "weight_norm_eps": 1e-6,
    }
    return CLASSES[decoder][0](
        vocab_size=VOCAB_SIZE + 3,  # as in Qwen2, rows that no token has
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=32768,
        initializer_range=INITIALIZER_RANGE,
        pad_token_id=TOKEN_IDS["pad_token"],
        bos_token_id=None,
        eos_token_id=TOKEN_IDS["im_end_token"],
        vision_config=tower,
        audio_config=ears,
        mm_projector_type="stc_connector_v35" if decoder == "qwen2" else "stc_connector",
        num_frames=num_frames,
        **({"sliding_window": None} if decoder == "mistral" else {}),
    )


def tiny_videollama2(seed: int = 0, **dims: int | str) -> VideoLlama2Qwen2ForConditionalGeneration:
    """A random-weight model in eval mode, float32 on the CPU. dims: see tiny_videollama2_config.

    The same seed and dims give the same weights; the global random state is left as it was.
    """
    config = tiny_videollama2_config(**dims)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLASSES[config.model_type.rpartition("_")[2]][1](config)
    set_generation_tokens(model)
    return model.eval()


def processor_for(config: VideoLlama2Qwen2Config | VideoLlama2MistralConfig) -> VideoLlama2Processor:
    """The processor of a tiny model with this configuration."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return VideoLlama2Processor.from_config(config, tokenizer)

"""Random-weight video-SALMONN 2+ models of a few megabytes, for tests. What they say means nothing."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from fmd_ext.lab.tiny.model import INITIALIZER_RANGE, set_generation_tokens
from fmd_ext.lab.tiny.processor import byte_tokenizer
from fmd_ext.lab.tiny.vocabulary import TOKEN_IDS, VOCAB_SIZE
from fmd_ext.models.video_salmonn2_plus import (
    VideoSalmonn2PlusConfig,
    VideoSalmonn2PlusForConditionalGeneration,
    VideoSalmonn2PlusProcessor,
)

# The tokens around and in the place of clips that Qwen2.5-VL's tokenizer has, behind those of the byte tokenizer.
CLIP_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|audio_pad|>")


def tiny_video_salmonn2_plus_config(
    *, num_layers: int = 4, hidden_size: int = 128, num_heads: int = 4, num_kv_heads: int = 2, **settings: Any
) -> VideoSalmonn2PlusConfig:
    """The configuration of a tiny model. settings: more of `VideoSalmonn2PlusConfig`."""
    head_dim = hidden_size // num_heads
    spatial = 3 * head_dim // 16
    return VideoSalmonn2PlusConfig(
        text_config={
            "vocab_size": VOCAB_SIZE + len(CLIP_TOKENS),
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads,
            "max_position_embeddings": 32768,
            "initializer_range": INITIALIZER_RANGE,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                # Rotary frequencies (head_dim / 2 of them) given to time, height and width.
                "mrope_section": [head_dim // 2 - 2 * spatial, spatial, spatial],
            },
            "pad_token_id": TOKEN_IDS["pad_token"],
            "eos_token_id": TOKEN_IDS["im_end_token"],
            "bos_token_id": None,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": hidden_size,
            "fullatt_block_indexes": [1],
            "window_size": 56,
            "initializer_range": INITIALIZER_RANGE,
        },
        audio_config={
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "init_std": INITIALIZER_RANGE,
            "second_per_window": 2.5,  # 12 tokens for 30 s, not 60
            "second_stride": 2.5,
            "qformer_config": {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64},
        },
        initializer_range=INITIALIZER_RANGE,
        **{f"{name}_token_id": VOCAB_SIZE + place for name, place in _PLACES.items()},
        **settings,
    )


_PLACES = {"vision_start": 0, "vision_end": 1, "image": 2, "video": 3, "audio": 4}


def tiny_video_salmonn2_plus(seed: int = 0, **dims: Any) -> VideoSalmonn2PlusForConditionalGeneration:
    """A random-weight model in eval mode, float32 on the CPU. dims: see tiny_video_salmonn2_plus_config.

    The same seed and dims give the same weights; the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VideoSalmonn2PlusForConditionalGeneration(tiny_video_salmonn2_plus_config(**dims))
    set_generation_tokens(model)
    return model.eval()


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer with the tokens of Qwen2.5-VL that prompts about clips are made of."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(list(CLIP_TOKENS), special_tokens=True)
    return tokenizer


def processor_for(config: VideoSalmonn2PlusConfig) -> VideoSalmonn2PlusProcessor:
    """The processor of a tiny model with this configuration."""
    return VideoSalmonn2PlusProcessor.from_config(config, clip_tokenizer())

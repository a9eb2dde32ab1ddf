"""A small Phi-4-multimodal and a batch for it."""

from __future__ import annotations

import torch
from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM

IMAGE, SPEECH, PAD = 1, 2, 0
IMAGE_TOKENS = 13  # one crop and the whole image, 2 x (2 + 1) each, and a separator
MEL_FRAMES, SPEECH_TOKENS = 64, 8


def tiny_phi4() -> Phi4MultimodalForCausalLM:
    """Four layers, random weights, in eval mode."""
    config = Phi4MultimodalConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, original_max_position_embeddings=256, sliding_window=256,
        pad_token_id=PAD, bos_token_id=PAD, eos_token_id=PAD, initializer_range=0.2,
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 56, "crop_size": 56, "image_token_id": IMAGE,
        },
        audio_config={
            "hidden_size": 32, "intermediate_size": 48, "num_blocks": 3, "num_attention_heads": 2, "input_size": 16,
            "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 16,
            "audio_token_id": SPEECH,
        },
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Phi4MultimodalForCausalLM(config).eval()


def words(start, count):
    return list(range(start, start + count))


def batch(image=True, speech=True):
    """Two samples, the first longer; each with an image and speech if asked for."""
    pictures, sounds = [IMAGE] * IMAGE_TOKENS * image, [SPEECH] * SPEECH_TOKENS * speech
    rows = [
        words(5, 4) + pictures + words(9, 2) + sounds + words(20, 5),
        words(40, 2) + sounds + pictures + words(50, 3),
    ]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    draw = torch.Generator().manual_seed(0)
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    if image:
        inputs["image_pixel_values"] = torch.randn(2, 2, 3, 56, 56, generator=draw)
        inputs["image_sizes"] = torch.tensor([[56, 56], [56, 56]])
        inputs["image_attention_mask"] = torch.ones(2, 2, 4, 4)
    if speech:
        inputs["audio_input_features"] = torch.randn(2, MEL_FRAMES, 16, generator=draw)
        inputs["audio_embed_sizes"] = torch.tensor([SPEECH_TOKENS, SPEECH_TOKENS])
    return inputs

"""The recording of official video-SALMONN 2+, and folders in the layout of its published checkpoints."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from fmd_ext.tiny.video_salmonn2_plus import clip_tokenizer
from seeded_weights import seeded_tensor

FIXTURES = Path(__file__).parent / "fixtures"
CLIP = FIXTURES / "clip.mp4"
QUESTION = "Is the dog barking?"
RECORDED = np.load(FIXTURES / "video_salmonn2_plus.npz")
NAMES = json.loads(str(RECORDED["names"]))  # of the small model's tensors, with their shapes
FULL_NAMES = json.loads(gzip.decompress((FIXTURES / "video_salmonn2_plus_names.json.gz").read_bytes()))  # the 7B's
ADAPTER_NAMES = json.loads(str(RECORDED["adapter_names"]))
BUFFER = "audio.qformer.bert.embeddings.position_ids"  # the one tensor that the port has no use for

# What the official class writes into config.json: the decoder's settings, flat.
PUBLISHED = {
    "architectures": ["video_SALMONN2_plus"],
    "model_type": "qwen2_5_vl",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128000,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    "tie_word_embeddings": False,
    "audio_token_id": 151665,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "tokens_per_second": 2,
    },
    "audio_config": {
        "model_type": "whisper",
        "num_mel_bins": 128,
        "d_model": 1280,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "second_per_window": 0.5,
        "second_stride": 0.5,
        "qformer_config": {
            "model_type": "bert",
            "hidden_size": 3072,
            "num_hidden_layers": 2,
            "num_attention_heads": 12,
            "intermediate_size": 12288,
            "add_cross_attention": True,
            "cross_attention_freq": 1,
            "encoder_width": 1280,
            "out_hidden_size": 3584,
            "query_length": 1,
        },
    },
}

# The small model of the recording.
SMALL = {
    **PUBLISHED,
    "vocab_size": 274,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "vision_start_token_id": 269,
    "vision_end_token_id": 270,
    "image_token_id": 271,
    "video_token_id": 272,
    "audio_token_id": 273,
    "vision_config": {
        **PUBLISHED["vision_config"],
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    },
    "audio_config": {
        **PUBLISHED["audio_config"],
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "qformer_config": {
            **PUBLISHED["audio_config"]["qformer_config"],
            "hidden_size": 48,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "encoder_width": 32,
            "out_hidden_size": 64,
        },
    },
}

# Prompts of the recording: the picture's grid, seconds between pairs of frames, windows of sound.
CASES = {
    "one": ([3, 4, 6], 1.5, 1),
    "long": ([4, 4, 4], 10.25, 2),
    "silent": ([3, 4, 6], 1.5, 0),
    "heard": (None, None, 1),
}


def repeated(runs):
    """The ids [length] of recorded runs [n, 2] of an id and how often it comes."""
    return np.repeat(runs[:, 0], runs[:, 1])


def official_state():
    """The recorded model's tensors: official names, values by the rule of seeded_weights."""
    return {
        name: torch.arange(512)[None] if name == BUFFER else torch.from_numpy(seeded_tensor(name, tuple(shape), 7))
        for name, shape in NAMES.items()
    }


def write_official_folder(folder, state=None, **settings):
    """A folder as published: config.json, weights by official names, tokenizer."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SMALL, **settings}))
    save_file(official_state() if state is None else state, folder / "model.safetensors", metadata={"format": "pt"})
    clip_tokenizer().save_pretrained(folder)
    return folder


def write_official_adapter(folder, names=ADAPTER_NAMES, **settings):
    """LoRA weights as the official training saves them."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    state = {name: torch.from_numpy(seeded_tensor(name, tuple(shape), 9)) for name, shape in names.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def sound_windows(count):
    """The recording's log-mel windows [1, count, 128, 3000]."""
    return torch.from_numpy(seeded_tensor("features", (2, 128, 3000), 1))[None, :count]


def recorded_inputs(case):
    """The inputs of one of the recording's prompts."""
    grid, seconds, windows = CASES[case]
    ids = torch.from_numpy(repeated(RECORDED[f"{case}_ids"]).astype(np.int64))[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if grid is not None:
        pixels = seeded_tensor("pixels", (int(np.prod(grid)), 1176), 3)
        inputs["pixel_values_videos"] = torch.from_numpy(pixels)
        inputs["video_grid_thw"] = torch.tensor([grid])
        inputs["second_per_grid_ts"] = torch.tensor([seconds])
    if windows:
        inputs["input_features"] = sound_windows(windows)
    return inputs

"""The recording of official video-SALMONN 2, and folders in the layout of its checkpoints."""

from __future__ import annotations

import json

import numpy as np
import torch
from safetensors.torch import save_file

from fmd_ext.inputs.media import Clip
from fmd_ext.lab.tiny.processor import byte_tokenizer
from fmd_ext.models.video_salmonn2 import VideoSalmonn2Processor
from paths import FIXTURES
from seeded_weights import seeded_tensor

CLIP = FIXTURES / "clip.mp4"
QUESTION = "Is the dog barking?"
RECORDED = np.load(FIXTURES / "video_salmonn2.npz")
NAMES = json.loads(str(RECORDED["names"]))  # of the small model's parameters, with their shapes

# What a published configuration holds: Qwen2's settings, what is left of the base model's, and the run's own.
PUBLISHED = {
    "model_type": "video_salmonn_2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "use_sliding_window": False,
    "sliding_window": 131072,
    "torch_dtype": "bfloat16",
    "add_time_token": True,
    "mm_hidden_size": 1152,
    "mm_newline_position": "one_token",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_spatial_pool_mode": "bilinear",
    "mm_spatial_pool_stride": None,
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "model_args": {
        "mm_newline_position": "grid",
        "mm_spatial_pool_mode": "max",
        "mm_spatial_pool_stride": 2,
        "mm_pooling_position": "after",
        "second_per_window": 0.5,
        "second_stride": 0.5,
        "use_final_linear": True,
        "lora_r": 128,
    },
}

# The small model of the recording, in the words of a published configuration.
SMALL = {
    "model_type": "video_salmonn_2",
    "vocab_size": 276,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_spatial_pool_mode": "bilinear",  # what the base model had: the next line is in force
    "model_args": {"mm_spatial_pool_mode": "max", "second_per_window": 0.5, "whisper_path": "openai/whisper-large-v3"},
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 54,
        "patch_size": 2,
    },
    "audio_config": {
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "num_mel_bins": 16,
    },
    "qformer_config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "cross_attention_frequency": 1,
    },
}
# frames, windows of sound, seconds of picture
CASES = {"av": (7, 1, 7.3), "long": (7, 2, 41.0), "short": (2, 1, 0.9), "seen": (11, 0, 11.3), "heard": (0, 2, 60.0)}


def tokenizer():
    """As in Qwen2's, two line breaks in a row are one token."""
    own = byte_tokenizer()
    own.add_tokens(["\n\n"])
    return own


def official_state():
    """The recorded model's parameters: official names, values by the rule of seeded_weights."""
    return {n: torch.from_numpy(seeded_tensor(n, tuple(shape), 6)) for n, shape in NAMES.items()}


def write_official_folder(folder, state=None, **settings):
    """A folder as published: config.json, weights by official names, tokenizer; no processor's configuration."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SMALL, **settings}))
    save_file(official_state() if state is None else state, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save_pretrained(folder)
    return folder


def random_values(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def recorded_inputs(config, case):
    """The recording's prompt, frames and log-mel windows: placed by our processor, with the recording's own values."""
    frames, windows, seconds = CASES[case]
    processor = VideoSalmonn2Processor.from_config(config, tokenizer())
    picture = np.zeros((frames, 2, 2, 3), np.uint8) if frames else None
    samples = round(16000 * (seconds if frames else 30 * windows))
    sound = np.zeros(min(samples, 16000 * 30 * windows), np.float32) if windows else None
    clip = Clip(picture, frames / seconds or 1.0, sound, 16000, seconds)
    inputs = processor.prepare_clips([([clip], QUESTION)])
    if frames:
        inputs["pixel_values_videos"] = random_values(5, frames, 3, 54, 54)[None]
    if windows:
        assert inputs["input_features"].shape[1] == windows
        inputs["input_features"] = random_values(6, windows, 16, 3000)[None]
    return inputs

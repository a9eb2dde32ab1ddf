"""The recording of official VideoLLaMA2, and folders in the layout of the published checkpoints."""

from __future__ import annotations

import gzip
import json

import numpy as np
import torch
from safetensors.torch import save_file

from fmd_ext.lab.tiny.processor import byte_tokenizer
from paths import FIXTURES
from seeded_weights import seeded_tensor

CLIP = FIXTURES / "clip.mp4"
QUESTION = "Is the dog barking?"
RECORDED = np.load(FIXTURES / "videollama2.npz")
NAMES = json.loads(str(RECORDED["names"]))  # of the small models' parameters, with their shapes
FULL_NAMES = json.loads(gzip.decompress((FIXTURES / "videollama2_names.json.gz").read_bytes()))

# What published configurations hold: the decoder's settings, flat, and the towers by name.
PUBLISHED = {
    "model_type": "videollama2_qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_audio_tower": "work_dirs/audio_tower.bin",
    "mm_vision_select_layer": -2,
    "mm_projector_type": "stc_connector_v35",
    "mm_projector_a_type": "mlp2x_gelu",
    "mm_hidden_size": 1152,
    "mm_hidden_size_a": 768,
    "hidden_size_a": 3584,
    "num_frames": 16,
}

# The small models of the recording: SigLIP with Qwen2 as in 2.1, CLIP with Mistral as in the first models.
SMALL = {
    "vocab_size": 269,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "num_frames": 4,
    "mm_projector_a_type": "mlp2x_gelu",
    "audio_config": {
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
    },
}
TOWER = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TOWER |= {"image_size": 70, "patch_size": 14}
KINDS = {
    "qwen2": {
        "model_type": "videollama2_qwen2",
        "mm_projector_type": "stc_connector_v35",
        "vision_config": {**TOWER, "model_type": "siglip_vision_model"},
    },
    "mistral": {
        "model_type": "videollama2_mistral",
        "mm_projector_type": "stc_connector",
        "sliding_window": None,
        "vision_config": {**TOWER, "model_type": "clip_vision_model"},
    },
}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


def official_state(kind):
    """The recorded model's parameters: official names, values by the rule of seeded_weights."""
    return {n: torch.from_numpy(seeded_tensor(n, tuple(shape), 5)) for n, shape in NAMES[kind].items()}


def write_official_folder(folder, kind, state=None, **settings):
    """A folder as published: config.json, weights by official names, tokenizer; no processor's configuration."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SMALL, **KINDS[kind], **settings}))
    state = official_state(kind) if state is None else state
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def recorded_inputs(model, kind, placeholders=("video", "audio")):
    """The recording's prompt, frames and filter bank as inputs of our model."""
    frames = (torch.from_numpy(RECORDED["pixels"]).float() / 255 - 0.5) / 0.5
    features = torch.from_numpy(RECORDED["features_in"])
    config = model.config
    of_clip = []
    if "video" in placeholders:
        of_clip += [config.video_token_id] * config.num_video_tokens
    if "audio" in placeholders:
        of_clip += [config.audio_token_id] * config.num_audio_tokens(len(features))
    ids: list[int] = []
    for token in RECORDED[f"{kind}_ids"].tolist():
        ids += of_clip if token < 0 else [token]
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if "video" in placeholders:
        inputs["pixel_values_videos"] = frames[None, None]
    if "audio" in placeholders:
        inputs["input_features"] = features[None, None]
    return inputs

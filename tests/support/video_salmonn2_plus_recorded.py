"""The recording of official video-SALMONN 2+, and folders in the layout of its published checkpoints."""

from __future__ import annotations

import gzip
import json

import numpy as np
import torch
from safetensors.torch import save_file

from fmd_ext.lab.tiny.video_salmonn2_plus import clip_tokenizer
from paths import FIXTURES
from seeded_weights import seeded_tensor

CLIP = FIXTURES / "clip.mp4"
QUESTION = "Is the dog barking?"
RECORDED = np.load(FIXTURES / "video_salmonn2_plus.npz")
NAMES = json.loads(str(RECORDED["names"]))  # of the small model's tensors, with their shapes
SMALL = json.loads(str(RECORDED["config"]))  # what the official class writes into config.json
# The same two of a model of the 7B's size.
FULL, FULL_NAMES = json.loads(gzip.decompress((FIXTURES / "video_salmonn2_plus_7b.json.gz").read_bytes())).values()
ADAPTER_NAMES = json.loads(str(RECORDED["adapter_names"]))
BUFFER = "audio.qformer.bert.embeddings.position_ids"  # the one tensor that the port has no use for

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

"""The VideoLLaMA2 port against recordings of the official code, and which checkpoints it takes."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fmd_ext.models.videollama2 import (
    VideoLlama2MistralForConditionalGeneration,
    VideoLlama2Qwen2ForConditionalGeneration,
)
from fmd_ext.models.videollama2.connector import STCConnector
from videollama2_recorded import (
    KINDS,
    RECORDED,
    official_state,
    recorded_inputs,
    write_official_folder,
)

CLASSES = {
    "qwen2": VideoLlama2Qwen2ForConditionalGeneration,
    "mistral": VideoLlama2MistralForConditionalGeneration,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videollama2")
    return {kind: write_official_folder(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def models(folders):
    return {kind: AutoModelForCausalLM.from_pretrained(folder) for kind, folder in folders.items()}


def close(ours, official):
    assert tuple(ours.shape) == official.shape
    np.testing.assert_allclose(ours.numpy(), official, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_features_equal_the_official_ones(models, kind):
    model, inputs = models[kind], recorded_inputs(models[kind], kind)
    frames, features = inputs["pixel_values_videos"][0], inputs["input_features"][0]
    assert type(model) is CLASSES[kind]
    close(model.model.encode_videos(frames)[0], RECORDED[f"{kind}_video"])
    close(model.model.audio_tower(features)[0][0], RECORDED[f"{kind}_audio"])
    close(model.model.encode_audios(features)[0], RECORDED[f"{kind}_projected"])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_the_official_ones(models, kind):
    model, inputs = models[kind], recorded_inputs(models[kind], kind)
    assert inputs["input_ids"].shape[1] == RECORDED[f"{kind}_length"]
    close(model(**inputs).logits[0, -30:], RECORDED[f"{kind}_logits"])
    for part in ("video", "audio"):
        logits = model(**recorded_inputs(model, kind, (part,)), logits_to_keep=1).logits
        close(logits[0, 0], RECORDED[f"{kind}_{part}_only"])


@pytest.mark.parametrize("kind", KINDS)
def test_generate_answers_as_the_official_code(models, kind):
    model, inputs = models[kind], recorded_inputs(models[kind], kind)
    length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert ids[0, length:].tolist() == RECORDED[f"{kind}_answer"].tolist()
    whole = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(whole, ids)


def test_what_no_feature_passes_through_may_be_missing(tmp_path):
    """SigLIP's pooling head and BEATs' classifier."""
    state = {n: t for n, t in official_state("qwen2").items() if ".head." not in n and ".predictor." not in n}
    assert 0 < len(official_state("qwen2")) - len(state) < 20
    model = AutoModelForCausalLM.from_pretrained(write_official_folder(tmp_path / "headless", "qwen2", state))
    close(model(**recorded_inputs(model, "qwen2")).logits[0, -30:], RECORDED["qwen2_logits"])


def test_a_model_without_audio_tower(tmp_path):
    """VideoLLaMA2.1-7B-16F and its kin see only."""
    state = {
        name: t for name, t in official_state("qwen2").items() if "audio" not in name and "projector_a" not in name
    }
    folder = write_official_folder(tmp_path / "deaf", "qwen2", state, audio_config=None)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.audio_config is None
    logits = model(**recorded_inputs(model, "qwen2", ("video",)), logits_to_keep=1).logits
    close(logits[0, 0], RECORDED["qwen2_video_only"])
    with pytest.raises(ValueError, match="this model has no audio tower"):
        model(input_ids=torch.zeros(1, 3, dtype=torch.long), input_features=torch.zeros(1, 1, 72, 128))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"mm_vision_tower": "facebook/dino", "vision_config": None}, "mm_vision_tower 'facebook/dino' is not known"),
        ({"mm_projector_type": "mlp2x_gelu"}, "mm_projector_type 'mlp2x_gelu': accepted are stc_connector, "),
    ],
)
def test_unknown_parts_are_refused(folders, settings, message):
    config = json.loads((folders["qwen2"] / "config.json").read_text()) | settings
    with pytest.raises(ValueError, match=message):
        AutoConfig.for_model(**config)


def test_placeholders_must_match_the_clips(models):
    model = models["qwen2"]
    inputs = recorded_inputs(model, "qwen2")
    with pytest.raises(
        ValueError, match=r"the prompts hold \[8\] video placeholders, the inputs 0 clips for each of 1"
    ):
        model(**{**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:, :0]})
    with pytest.raises(ValueError, match=r"hold \[31\] audio placeholders, .* of 32 placeholders each"):
        model(**{**inputs, "input_ids": inputs["input_ids"][:, torch.arange(117) != 60]})


def test_without_timm_the_connector_says_what_to_install(monkeypatch):
    """And a torchvision that leaves the installed torch where it is: timm would bring the newest."""
    monkeypatch.setitem(sys.modules, "timm.layers", None)
    with pytest.raises(ImportError, match=r"from timm's .*--no-deps 'torchvision.*&& pip install timm"):
        STCConnector(8, 8, padding=1)

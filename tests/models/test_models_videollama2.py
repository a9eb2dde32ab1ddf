"""The VideoLLaMA2 port against recordings of the official code, and which checkpoints it takes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from fmd_ext.models.videollama2 import (
    VideoLlama2MistralForConditionalGeneration,
    VideoLlama2Qwen2Config,
    VideoLlama2Qwen2ForConditionalGeneration,
)
from videollama2_recorded import (
    FULL_NAMES,
    KINDS,
    NAMES,
    PUBLISHED,
    RECORDED,
    official_state,
    recorded_inputs,
    write_official_folder,
)

CLASSES = {
    "qwen2": VideoLlama2Qwen2ForConditionalGeneration,
    "mistral": VideoLlama2MistralForConditionalGeneration,
}
REPEATED = "model.audio_tower.encoder.layers.1.self_attn.relative_attention_bias.weight"


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


def test_the_published_shape_has_the_official_names_and_shapes():
    """VideoLLaMA2.1-7B-AV at full size, without memory, by what its configuration says; against the official model.

    Three rules bring official names to ours: SigLIP's modules were once one level deeper, its pooling head is left out,
    and every BEATs layer repeats the first one's table. The test after the next shows that loading follows them.
    """
    config = VideoLlama2Qwen2Config(**{k: v for k, v in PUBLISHED.items() if k != "model_type"})
    assert config.num_video_tokens == 1352 and config.num_audio_tokens(2998) == 1496
    with torch.device("meta"):
        model = VideoLlama2Qwen2ForConditionalGeneration(config)
    ours = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    official = {
        name.replace("vision_tower.vision_model.", "vision_tower."): shape
        for name, shape in FULL_NAMES.items()
        if ".vision_model.head." not in name and ("relative_attention_bias" not in name or ".layers.0." in name)
    }
    assert ours == official
    assert len(FULL_NAMES) - len(official) == 11 + 11  # the tables, the head


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_an_official_folder_loads_whole(folders, auto):
    model, report = auto.from_pretrained(folders["qwen2"], output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    state = official_state("qwen2")
    patch = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    assert torch.equal(
        model.model.vision_tower.vision_tower.embeddings.patch_embedding.weight, state[f"model.vision_tower.{patch}"]
    )
    assert torch.equal(
        model.model.audio_tower.encoder.pos_conv[0].weight_g, state["model.audio_tower.encoder.pos_conv.0.weight_g"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_has_the_official_names(models, kind, tmp_path):
    models[kind].save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in saved.items()} == {
        name: shape for name, shape in NAMES[kind].items() if name != REPEATED and ".vision_model.head." not in name
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == KINDS[kind]["model_type"] and config["hidden_size"] == 64
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = recorded_inputs(again, kind)
    assert torch.equal(again(**inputs).logits, models[kind](**inputs).logits)


@pytest.mark.parametrize(
    "gone, named",
    [
        ("model.mm_projector.readout.0.weight", r"lacks 1 tensors: model.mm_projector.readout.0.weight"),
        ("model.audio_tower.", r"lacks \d+ tensors: model.audio_tower.encoder.layer_norm.bias, "),
        ("model.vision_tower.", r"lacks \d+ tensors: model.vision_tower.vision_tower.embeddings"),
    ],
)
def test_a_partial_checkpoint_is_refused_by_name(tmp_path, gone, named):
    state = {name: tensor for name, tensor in official_state("qwen2").items() if not name.startswith(gone)}
    folder = write_official_folder(tmp_path / "partial", "qwen2", state)
    with pytest.raises(ValueError, match="is no complete VideoLlama2Qwen2ForConditionalGeneration: it " + named):
        AutoModelForCausalLM.from_pretrained(folder)


def test_what_no_feature_passes_through_may_be_missing(tmp_path):
    """SigLIP's pooling head and BEATs' classifier."""
    state = {n: t for n, t in official_state("qwen2").items() if ".head." not in n and ".predictor." not in n}
    assert 0 < len(official_state("qwen2")) - len(state) < 20
    model = AutoModelForCausalLM.from_pretrained(write_official_folder(tmp_path / "headless", "qwen2", state))
    close(model(**recorded_inputs(model, "qwen2")).logits[0, -30:], RECORDED["qwen2_logits"])


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 0.05), (torch.bfloat16, 0.4)])
def test_low_precision_stays_near(folders, dtype, bound):
    model = AutoModelForCausalLM.from_pretrained(folders["qwen2"], dtype=dtype)
    logits = model(**recorded_inputs(model, "qwen2")).logits
    assert logits.dtype == dtype
    np.testing.assert_allclose(logits[0, -30:].float().numpy(), RECORDED["qwen2_logits"], atol=bound, rtol=0)


def test_towers_fetched_from_disk_when_they_are_needed(folders, tmp_path):
    """accelerate's device_map: each part may lie elsewhere."""
    fetched = ("model.vision_tower", "model.mm_projector", "model.audio_tower", "model.mm_projector_a")
    at_hand = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(fetched, "disk") | dict.fromkeys(at_hand, "cpu")
    model = AutoModelForCausalLM.from_pretrained(folders["qwen2"], device_map=places, offload_folder=tmp_path)
    assert model.model.audio_tower.encoder.layers[0].fc1.weight.device.type == "meta"
    close(model(**recorded_inputs(model, "qwen2")).logits[0, -30:], RECORDED["qwen2_logits"])


def test_another_models_checkpoint_is_refused_by_name(tmp_path):
    folder = write_official_folder(tmp_path / "other", "qwen2", {"transformer.wte.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"lacks \d+ tensors.*; it holds 1 others, such as transformer.wte.weight"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_checkpoint_of_another_shape_is_refused_by_name(tmp_path):
    state = official_state("qwen2")
    state["model.mm_projector_a.0.weight"] = torch.zeros(64, 40)
    folder = write_official_folder(tmp_path / "unfit", "qwen2", state)
    with pytest.raises(
        ValueError, match=r"of 1 tensors: model.mm_projector_a.0.weight is \[64, 40\] instead of \[64, 48\]"
    ):
        AutoModelForCausalLM.from_pretrained(folder)


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

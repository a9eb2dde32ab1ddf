"""The video-SALMONN 2 port against recordings of the official code, and which checkpoints it takes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from fmd_ext.models.video_salmonn2 import VideoSalmonn2ForConditionalGeneration
from fmd_ext.models.video_salmonn2.modeling import _window_positions
from video_salmonn2_recorded import (
    CASES,
    NAMES,
    PUBLISHED,
    RECORDED,
    SMALL,
    official_state,
    random_values,
    recorded_inputs,
    write_official_folder,
)

UNUSED = "speech_Qformer.bert.embeddings.position_ids"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_official_folder(tmp_path_factory.mktemp("video_salmonn2") / "model")


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def close(ours, name):
    assert tuple(ours.shape) == RECORDED[name].shape
    np.testing.assert_allclose(ours.numpy(), RECORDED[name], atol=1e-4, rtol=0)


def test_frame_tokens_equal_the_official_ones(model):
    frames = random_values(4, 2, 3, 54, 54)
    tower = model.model.vision_tower.vision_tower
    close(tower.encoder(inputs_embeds=tower.embeddings(frames)).last_hidden_state[:, ::40], "tower")
    # The recording has the patches alone, a row of 13 by the other: without the token behind each row.
    tokens = model.model.encode_frames(frames).unflatten(1, (13, 14))
    close(tokens[:, :, :13].flatten(1, 2)[:, ::8], "frame_tokens")
    assert torch.equal(tokens[1, 5, 13], model.model.image_newline)


def test_sound_tokens_equal_the_official_ones(model):
    features = random_values(3, 2, 16, 3000)
    close(model.speech_encoder(features).last_hidden_state[:, ::100], "whisper")
    official = RECORDED["sound_tokens"]  # of windows one by one: the second one's position is added later
    close_to = [model.encode_sound(window[None])[0].numpy() for window in features]
    np.testing.assert_allclose(np.stack(close_to), official, atol=1e-4, rtol=0)
    close(_window_positions(6, 32), "window_positions")


@pytest.mark.parametrize("case", CASES)
def test_the_decoders_input_equals_the_official_one(model, case):
    """Order and place of frames, of sound between and behind them, of times, and their values."""
    inputs = recorded_inputs(model.config, case)
    features = [inputs.get(name) for name in ("pixel_values_videos", "input_features", "sound_order")]
    embeds = model._embed(inputs["input_ids"], *features)[0]
    close(embeds[:, :2], f"{case}_embeds")
    close(embeds[::29], f"{case}_rows")


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_equal_the_official_ones(model, case):
    inputs = recorded_inputs(model.config, case)
    close(model(**inputs, logits_to_keep=6).logits[0], f"{case}_logits")
    ids = model.generate(**inputs, max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert ids[0, inputs["input_ids"].shape[1] :].tolist() == RECORDED[f"{case}_answer"].tolist()


def test_the_published_shape_has_the_official_names_and_shapes():
    """The 7B model at full size, without memory, by what its configuration says."""
    config = AutoConfig.for_model(**PUBLISHED)
    assert (config.num_frame_tokens, config.num_sound_tokens) == (182, 60)
    with torch.device("meta"):
        model = VideoSalmonn2ForConditionalGeneration(config)
    ours = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    official = {}
    for name, (shape, layers) in json.loads(str(RECORDED["full_parameters"])).items():
        for layer in [None] if layers is None else range(*layers):
            own = name.replace("#", str(layer)).replace("vision_tower.vision_model.", "vision_tower.")
            official[own] = shape
    assert official.pop(UNUSED) == [1, 512]
    assert ours == official


def test_settings_that_are_not_said_are_those_of_the_released_scripts():
    bare = {name: value for name, value in PUBLISHED.items() if not name.startswith(("mm_", "model_args"))}
    for said in ({}, {"mm_spatial_pool_stride": None}):
        config = AutoConfig.for_model(**bare, **said)
        assert (config.num_frame_tokens, config.num_sound_tokens, config.mm_spatial_pool_mode) == (182, 60, "max")
    assert AutoConfig.for_model(**bare, second_per_window=1.0).num_sound_tokens == 59


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_an_official_folder_loads_whole(folder, auto):
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert type(model) is VideoSalmonn2ForConditionalGeneration
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert (model.config.mm_spatial_pool_mode, model.config.num_frame_tokens) == ("max", 182)


def test_a_saved_folder_has_the_official_names(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    expected = {name: shape for name, shape in NAMES.items() if name != UNUSED}
    assert {name: list(tensor.shape) for name, tensor in saved.items()} == expected
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = recorded_inputs(again.config, "short")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    "gone, named",
    [
        ("model.image_newline", "1 tensors: model.image_newline"),
        ("speech_Qformer.", r"\d+ tensors: speech_Qformer.bert.embeddings.LayerNorm"),
        ("model.vision_tower.", r"\d+ tensors: model.vision_tower.vision_tower.embeddings"),
    ],
)
def test_a_partial_checkpoint_is_refused_by_name(tmp_path, gone, named):
    state = {name: tensor for name, tensor in official_state().items() if not name.startswith(gone)}
    with pytest.raises(ValueError, match="is no complete VideoSalmonn2ForConditionalGeneration: it lacks " + named):
        AutoModelForCausalLM.from_pretrained(write_official_folder(tmp_path / "partial", state))


def test_a_checkpoint_of_another_shape_is_refused_by_name(tmp_path):
    folder = write_official_folder(tmp_path / "unfit", num_speech_query_token=2, model_args={})
    with pytest.raises(ValueError, match="mm_spatial_pool_mode 'bilinear': accepted are max, average"):
        AutoModelForCausalLM.from_pretrained(folder)
    folder = write_official_folder(tmp_path / "unfit", mm_spatial_pool_mode="max", num_speech_query_token=2)
    with pytest.raises(ValueError, match=r"speech_query_tokens is \[1, 1, 32\] instead of \[1, 2, 32\]"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "position, mode, side", [("before", "max", 13), ("before", "average", 13), ("no", "max", 27), ("after", "max", 13)]
)
def test_where_patches_are_pooled(model, position, mode, side):
    config = AutoConfig.for_model(**{**SMALL, "model_args": {}, "mm_spatial_pool_mode": mode})
    config.mm_pooling_position = position
    other = VideoSalmonn2ForConditionalGeneration(config).eval()
    other.load_state_dict(model.state_dict())
    tokens = other.model.encode_frames(random_values(4, 1, 3, 54, 54))
    assert tokens.shape == (1, side * (side + 1), 32) and config.num_frame_tokens == side * (side + 1)


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 0.05), (torch.bfloat16, 0.4)])
def test_low_precision_stays_near(folder, dtype, bound):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    logits = model(**recorded_inputs(model.config, "short"), logits_to_keep=6).logits
    assert logits.dtype == dtype
    np.testing.assert_allclose(logits[0].float().numpy(), RECORDED["short_logits"], atol=bound, rtol=0)


def test_placeholders_must_match_the_clip(model):
    inputs = recorded_inputs(model.config, "short")
    for change, message in (
        (
            {"pixel_values_videos": inputs["pixel_values_videos"][:, :1]},
            r"hold \[364\] video placeholders, .* 1 frames",
        ),
        ({"sound_order": inputs["sound_order"][:, :9]}, r"hold \[61\] audio placeholders, .* sound_order \[1, 9\]"),
        ({"sound_order": None}, "sound_order None: both are needed"),
        ({"sound_order": inputs["sound_order"] + 1}, "asks for token 60, its 1 windows of sound have 60 tokens each"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{**inputs, **change})


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match")  # two are parameters, not modules
def test_towers_fetched_from_disk_when_they_are_needed(folder, tmp_path):
    """accelerate's device_map: each part may lie elsewhere."""
    fetched = ("model.vision_tower", "model.mm_projector", "speech_encoder", "ln_speech", "speech_Qformer")
    at_hand = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "model.image_newline", "lm_head")
    at_hand += ("speech_query_tokens", "speech_llama_proj", "final_linear")
    places = dict.fromkeys(fetched, "disk") | dict.fromkeys(at_hand, "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    assert model.speech_encoder.layers[0].fc1.weight.device.type == "meta"
    close(model(**recorded_inputs(model.config, "short"), logits_to_keep=6).logits[0], "short_logits")

"""The video-SALMONN 2 port against recordings of the official code, and which checkpoints it takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fmd_ext.models.video_salmonn2 import VideoSalmonn2ForConditionalGeneration
from fmd_ext.models.video_salmonn2.modeling import _window_positions
from video_salmonn2_recorded import (
    CASES,
    PUBLISHED,
    RECORDED,
    SMALL,
    random_values,
    recorded_inputs,
    write_official_folder,
)


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


def test_settings_that_are_not_said_are_those_of_the_released_scripts():
    bare = {name: value for name, value in PUBLISHED.items() if not name.startswith(("mm_", "model_args"))}
    for said in ({}, {"mm_spatial_pool_stride": None}):
        config = AutoConfig.for_model(**bare, **said)
        assert (config.num_frame_tokens, config.num_sound_tokens, config.mm_spatial_pool_mode) == (182, 60, "max")
    assert AutoConfig.for_model(**bare, second_per_window=1.0).num_sound_tokens == 59


def test_the_runs_own_settings_are_in_force(model, tmp_path):
    """``model_args``; without them the base model's, whose way of pooling is not known."""
    assert (model.config.mm_spatial_pool_mode, model.config.num_frame_tokens) == ("max", 182)
    folder = write_official_folder(tmp_path / "bare", model_args={})
    with pytest.raises(ValueError, match="mm_spatial_pool_mode 'bilinear': accepted are max, average"):
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

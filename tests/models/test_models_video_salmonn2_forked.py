"""Fork-merge decoding on video-SALMONN 2: against the plain reference, in batches, by generate and the command line."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import AutoConfig

import fmd_ext
from fmd_ext import FMDConfig
from fmd_ext.cli import main
from fmd_ext.engine.reference import reference_generate, reference_logits
from fmd_ext.inputs.chat import prepare_batch
from fmd_ext.inputs.media import Clip
from fmd_ext.models.video_salmonn2 import VideoSalmonn2ForConditionalGeneration, VideoSalmonn2Processor
from seeded_weights import fill
from video_salmonn2_recorded import CLIP, SMALL, official_state, tokenizer, write_official_folder

SETTINGS = [
    {"masking": "zero", "fork_layers": 2, "alpha": 0.7, "text_weight": 0.4},
    {"masking": "zero", "fork_layers": 3, "mask_scale": 0.3, "alpha": {"visual": 0.9, "audio": 0.6}},
    {"masking": "attention", "fork_layers": 2, "text_weight": 0.4},
]


@pytest.fixture(scope="module")
def _model():
    """As in the recording, but frames of 6 tokens and windows of sound of 3 s, of 6 tokens."""
    settings = copy.deepcopy(SMALL)
    settings["vision_config"]["image_size"] = 10
    settings["audio_config"]["max_source_positions"] = 150
    config = AutoConfig.for_model(**settings)
    model = VideoSalmonn2ForConditionalGeneration(config).eval()
    fill(model.state_dict(), 6)
    assert (config.num_frame_tokens, config.num_sound_tokens) == (6, 6)
    return model


@pytest.fixture
def model(_model):
    yield _model
    if fmd_ext.handle_of(_model) is not None:
        fmd_ext.unpatch(_model)


def clip(seed, frames=5, seconds=5.0, sound=True):
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (frames, 24, 32, 3), dtype=np.uint8) if frames else None
    audio = rng.standard_normal(round(16000 * seconds)).astype(np.float32) * 0.1 if sound else None
    return Clip(picture, frames / seconds or 1.0, audio, 16000, seconds)


BATCHES = {
    "one": [([clip(0)], "Is it loud?")],
    "padded": [([clip(0)], "Is it loud?"), ([clip(1, frames=2, seconds=0.1)], "What is the colour of the disc?")],
    "mixed": [([clip(0, sound=False)], "What?"), ([clip(1)], "Same?"), ([], "Who?"), ([clip(3, frames=0)], "Eh?")],
}


def build(model, batch):
    return prepare_batch(VideoSalmonn2Processor.from_config(model.config, tokenizer()), BATCHES[batch])


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("batch", BATCHES)
def test_logits_equal_the_reference(model, batch, settings):
    inputs = build(model, batch)
    config = FMDConfig(**settings).resolve(FMDConfig(), 3)
    expected = reference_logits(model, config, **inputs)
    keep = inputs["attention_mask"].bool()
    vanilla = model(**inputs).logits
    handle = fmd_ext.patch(model, config)
    logits = model(**inputs).logits
    torch.testing.assert_close(logits[keep], expected[keep], atol=1e-4, rtol=0)
    forked = {"one": [True], "padded": [True, True], "mixed": [False, True, False, False]}[batch]
    assert handle.last_call.plan.forked.tolist() == forked and not handle.why_not_fused
    for row, (is_forked, mask) in enumerate(zip(forked, keep, strict=True)):
        difference = (logits[row] - vanilla[row])[mask].abs().max()
        assert difference > 0.02 if is_forked else difference < 1e-4
    fmd_ext.unpatch(model)
    assert torch.equal(model(**inputs).logits, vanilla)


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[2]])
@pytest.mark.parametrize("batch", ["padded", "mixed"])
def test_greedy_tokens_equal_the_reference(model, batch, settings):
    inputs = build(model, batch)
    config = FMDConfig(**settings).resolve(FMDConfig(), 3)
    expected = reference_generate(model, config, 4, **inputs)
    fmd_ext.patch(model, config)
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out[:, inputs["input_ids"].shape[1] :].tolist() == expected.tolist()


def test_labels_follow_frames_and_sound(model):
    """Five frames; the 12 tokens of two windows of sound become 15, three behind each frame."""
    inputs = build(model, "mixed")
    labels = fmd_ext.adapters.find_adapter(model).labels_of(model, inputs["input_ids"], inputs)
    assert [(row == 1).sum() for row in labels] == [30, 30, 0, 0]
    assert [(row == 2).sum() for row in labels] == [0, 15, 0, 12]
    runs, lengths = torch.unique_consecutive(labels[1], return_counts=True)
    assert runs.tolist() == [0, *[1, 2] * 5, 0] and lengths[1:-1].tolist() == [6, 3] * 5
    assert torch.unique_consecutive(labels[0]).tolist() == [0, *[1, 0] * 5]  # times are text


def test_batches_equal_their_samples(model):
    together = build(model, "mixed")
    logits = model(**together).logits
    for row, conversation in enumerate(BATCHES["mixed"]):
        alone = prepare_batch(VideoSalmonn2Processor.from_config(model.config, tokenizer()), [conversation])
        own = model(**alone).logits[0]
        torch.testing.assert_close(logits[row, -len(own) :], own, atol=1e-4, rtol=0)


@pytest.mark.parametrize("patched", [False, True])
def test_beams_and_several_sequences_keep_clips_with_their_samples(model, patched):
    if patched:
        fmd_ext.patch(model, fork_layers=2)
    inputs = build(model, "mixed")
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "num_beams": 2, "num_return_sequences": 2}
    together = model.generate(**inputs, **options)[:, length:]
    for row in (0, 1):
        processor = VideoSalmonn2Processor.from_config(model.config, tokenizer())
        alone = prepare_batch(processor, BATCHES["mixed"][row : row + 1])
        own = model.generate(**alone, **options)
        assert together[2 * row : 2 * row + 2].tolist() == own[:, alone["input_ids"].shape[1] :].tolist()


def test_a_second_turn_on_one_cache(model):
    fmd_ext.patch(model, fork_layers=2)
    inputs = build(model, "one")
    first = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[20, 30, 40]])], dim=1)
    both = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    whole = model(**both, logits_to_keep=1).logits
    cache = first.past_key_values
    rest = ids[:, cache.get_seq_length() :]
    onward = model(input_ids=rest, attention_mask=both["attention_mask"], past_key_values=cache, logits_to_keep=1)
    torch.testing.assert_close(onward.logits, whole, atol=1e-4, rtol=0)


def test_ask_answers_from_an_official_folder(tmp_path, capsys):
    folder = write_official_folder(tmp_path / "model")
    command = ["ask", str(CLIP), "What?", "--model", str(folder), "--max-new-tokens", "3"]
    assert main([*command, "--compare", "--fork-layers", "2"]) == 0
    assert "2 of 3 layers forked" in capsys.readouterr().out
    assert main([*command, "--vanilla", "--fps", "2", "--interleaved"]) == 0
    assert "picks frames by a rule of its own" in capsys.readouterr().err


def test_ask_refuses_in_one_line(tmp_path, capsys):
    state = {name: tensor for name, tensor in official_state().items() if name != "model.image_newline"}
    folder = write_official_folder(tmp_path / "model", state)
    assert main(["ask", str(CLIP), "What?", "--model", str(folder)]) == 2
    assert "it lacks 1 tensors: model.image_newline" in capsys.readouterr().err.splitlines()[-1]

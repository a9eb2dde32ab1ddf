"""Fork-merge decoding on video-SALMONN 2+: against the plain reference, in batches, by generate and command line."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fmd_ext
from fmd_ext import FMDConfig
from fmd_ext.cli import main
from fmd_ext.engine.reference import reference_generate, reference_logits
from fmd_ext.inputs.chat import prepare_batch
from fmd_ext.inputs.media import Clip
from fmd_ext.lab.tiny import save_random_model
from fmd_ext.lab.tiny.video_salmonn2_plus import processor_for, tiny_video_salmonn2_plus
from recorded import record_steps
from video_salmonn2_plus_recorded import CLIP, official_state, write_official_folder

SETTINGS = [
    {"masking": "zero", "fork_layers": 2, "alpha": 0.7, "text_weight": 0.4},
    {"masking": "zero", "fork_layers": 4, "mask_scale": 0.3, "alpha": {"visual": 0.9, "audio": 0.6}},
    {"masking": "attention", "fork_layers": 2, "text_weight": 0.4},
]


def clip(seed, picture=True, sound=True, seconds=7.0):
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (6, 28, 56, 3), dtype=np.uint8) if picture else None
    audio = rng.standard_normal(round(16000 * seconds)).astype(np.float32) * 0.1 if sound else None
    return Clip(frames, 6 / seconds, audio, 16000, seconds)


BATCHES = {
    "one": [([clip(0)], "Is it loud?")],
    "padded": [([clip(0)], "Is it loud?"), ([clip(1)], "What is the colour of the disc?")],
    "mixed": [
        ([clip(0, sound=False)], "What?"),
        ([clip(1), clip(2, seconds=31.0)], "Same?"),
        ([], "Who?"),
        ([clip(3, False)], "Eh?"),
    ],
}


@pytest.fixture(scope="module")
def _model():
    return tiny_video_salmonn2_plus(seed=0)


@pytest.fixture
def model(_model):
    yield _model
    _model.config.mrope_positions = "inference"
    if fmd_ext.handle_of(_model) is not None:
        fmd_ext.unpatch(_model)


def build(model, batch):
    return prepare_batch(processor_for(model.config), BATCHES[batch], frame_pixels=(784, 1568))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("batch, counted", [*((batch, "inference") for batch in BATCHES), ("mixed", "training")])
def test_logits_equal_the_reference(model, batch, counted, settings):
    model.config.mrope_positions = counted
    inputs = build(model, batch)
    config = FMDConfig(**settings).resolve(FMDConfig(), 4)
    expected = reference_logits(model, config, **inputs)
    keep = inputs["attention_mask"].bool()
    vanilla = model(**inputs).logits
    handle = fmd_ext.patch(model, config)
    logits = model(**inputs).logits
    torch.testing.assert_close(logits[keep], expected[keep], atol=1e-4, rtol=0)
    forked = {"one": [True], "padded": [True, True], "mixed": [False, True, False, False]}[batch]
    assert handle.last_call.plan.forked.tolist() == forked
    for row, (is_forked, mask) in enumerate(zip(forked, keep, strict=True)):
        difference = (logits[row] - vanilla[row])[mask].abs().max()
        assert difference > 0.02 if is_forked else difference < 1e-4
    fmd_ext.unpatch(model)
    assert torch.equal(model(**inputs).logits, vanilla)


@pytest.mark.parametrize(
    "batch, counted, settings",
    [
        ("padded", "inference", SETTINGS[0]),
        ("mixed", "inference", SETTINGS[2]),
        ("mixed", "training", SETTINGS[0]),
    ],
)
def test_greedy_tokens_equal_the_reference(model, batch, counted, settings):
    model.config.mrope_positions = counted
    inputs = build(model, batch)
    config = FMDConfig(**settings).resolve(FMDConfig(), 4)
    expected = reference_generate(model, config, 4, **inputs)
    fmd_ext.patch(model, config)
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out[:, inputs["input_ids"].shape[1] :].tolist() == expected.tolist()


def test_the_runner_replays_its_steps(model, monkeypatch):
    """Decode steps as a graph on CUDA would replay them: nothing in them reads a value back."""
    inputs = build(model, "mixed")
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with fmd_ext.patch(model, fork_layers=2) as handle:
        assert handle.why_not_fused == ""
        expected = model.generate(**inputs, **options)
    recordings = record_steps(monkeypatch)
    with fmd_ext.patch(model, fork_layers=2, runner=True):
        assert torch.equal(model.generate(**inputs, **options), expected)
    assert len(recordings) == 1


def test_labels_follow_the_clips_parts(model):
    inputs = build(model, "mixed")
    labels = fmd_ext.adapters.find_adapter(model).labels_of(model, inputs["input_ids"], inputs)
    assert [(row == 1).sum() for row in labels] == [6, 12, 0, 0]
    assert [(row == 2).sum() for row in labels] == [0, 36, 0, 12]  # 12 tokens for each 30 s begun
    runs = torch.unique_consecutive(labels[1])
    # Two tokens per second: the second clip's 24 are all placed before its last pair of frames.
    assert runs.tolist() == [0, 1, 2, 1, 2, 1, 2, 0, 1, 2, 1, 2, 1, 0]


@pytest.mark.parametrize("patched", [False, True])
def test_beams_and_several_sequences_keep_clips_with_their_samples(model, patched):
    if patched:
        fmd_ext.patch(model, fork_layers=2)
    inputs = build(model, "mixed")
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    together = model.generate(**inputs, **options, num_beams=2, num_return_sequences=2)[:, length:]
    for row, conversation in enumerate(BATCHES["mixed"]):
        alone = prepare_batch(processor_for(model.config), [conversation], frame_pixels=(784, 1568))
        own = model.generate(**alone, **options, num_beams=2, num_return_sequences=2)
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
    command = ["ask", str(CLIP), "What?", "--model", str(folder), "--max-new-tokens", "4", "--max-frame-pixels", "3136"]
    assert main([*command, "--compare", "--fork-layers", "3", "--masking", "attention"]) == 0
    out, _ = capsys.readouterr()
    assert "3 of 3 layers forked, masking attention" in out
    assert main([*command, "--vanilla", "--fps", "1"]) == 0
    assert "picks frames by a rule of its own" in capsys.readouterr().err


def test_ask_and_verify_take_a_saved_folder(tmp_path, capsys):
    folder = save_random_model(tmp_path / "model", family="video_salmonn2_plus")
    command = [str(CLIP), "--model", str(folder), "--fork-layers", "2", "--max-new-tokens", "3"]
    assert main(["verify", *command]) == 0
    assert capsys.readouterr().out.count("equal") >= 2
    assert main(["ask", *command[:1], "What?", *command[1:]]) == 0
    assert "weights are random" in capsys.readouterr().err


def test_ask_refuses_a_partial_checkpoint_in_one_line(tmp_path, capsys):
    state = {name: tensor for name, tensor in official_state().items() if name != "audio.q_tokens"}
    folder = write_official_folder(tmp_path / "model", state)
    assert main(["ask", str(CLIP), "What?", "--model", str(folder)]) == 2
    assert "it lacks 1 tensors: model.audio.q_tokens" in capsys.readouterr().err.splitlines()[-1]

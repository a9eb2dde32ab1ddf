"""Fork-merge decoding on VideoLLaMA2: against the plain reference, in batches, by generate and the command line."""

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
from fmd_ext.lab.tiny.videollama2 import processor_for, tiny_videollama2
from videollama2_recorded import CLIP, official_state, write_official_folder

KINDS = ("qwen2", "mistral")
SETTINGS = [
    {"masking": "zero", "fork_layers": 2, "alpha": 0.7, "text_weight": 0.4},
    {"masking": "zero", "fork_layers": 4, "mask_scale": 0.3, "alpha": {"visual": 0.9, "audio": 0.6}},
    {"masking": "attention", "fork_layers": 2, "text_weight": 0.4},
]


def processor_of(model):
    """Its clips sound short and its prompts are short, for the tests' time: 72 frames of filter bank, not 2998."""
    processor = processor_for(model.config)
    whole = processor._sound
    processor._sound = lambda clip: whole(clip)[:72]
    processor.system_prompt = None
    return processor


def clip(seed, picture=True, sound=True):
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (4, 32, 48, 3), dtype=np.uint8) if picture else None
    audio = rng.standard_normal(16000).astype(np.float32) * 0.1 if sound else None
    return Clip(frames, 4.0, audio, 16000, 1.0)


BATCHES = {
    "one": [([clip(0)], "Is it loud?")],
    "padded": [([clip(0)], "Is it loud?"), ([clip(1)], "What is the colour of the disc?")],
    "mixed": [
        ([clip(0, sound=False)], "What?"),
        ([clip(1), clip(2)], "Same?"),
        ([], "Who?"),
        ([clip(3, False)], "Eh?"),
    ],
}


@pytest.fixture(scope="module")
def _models():
    return {kind: tiny_videollama2(seed=0, decoder=kind) for kind in KINDS}


@pytest.fixture
def models(_models):
    yield _models
    for model in _models.values():
        if fmd_ext.handle_of(model) is not None:
            fmd_ext.unpatch(model)


def build(model, batch):
    return prepare_batch(processor_of(model), BATCHES[batch])


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    "kind, batch", [("qwen2", "one"), ("qwen2", "padded"), ("qwen2", "mixed"), ("mistral", "mixed")]
)
def test_logits_equal_the_reference(models, kind, batch, settings):
    model, inputs = models[kind], build(models[kind], batch)
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


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[2]])
@pytest.mark.parametrize("kind, batch", [("qwen2", "padded"), ("qwen2", "mixed"), ("mistral", "padded")])
def test_greedy_tokens_equal_the_reference(models, kind, batch, settings):
    model, inputs = models[kind], build(models[kind], batch)
    config = FMDConfig(**settings).resolve(FMDConfig(), 4)
    expected = reference_generate(model, config, 4, **inputs)
    fmd_ext.patch(model, config)
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out[:, inputs["input_ids"].shape[1] :].tolist() == expected.tolist()


def test_labels_follow_the_clips_parts(models):
    model = models["qwen2"]
    inputs = build(model, "mixed")
    labels = fmd_ext.adapters.find_adapter(model).labels_of(model, inputs["input_ids"], inputs)
    video, audio = model.config.num_video_tokens, model.config.num_audio_tokens(72)
    assert [(row == 1).sum() for row in labels] == [video, 2 * video, 0, 0]
    assert [(row == 2).sum() for row in labels] == [0, 2 * audio, 0, audio]
    runs = torch.unique_consecutive(labels[1])
    assert runs.tolist() == [0, 1, 2, 0, 1, 2, 0]  # a line break between the clips


@pytest.mark.parametrize("patched", [False, True])
def test_beams_and_several_sequences_keep_clips_with_their_samples(models, patched):
    """Repeated samples take their own clips along, also when each sample has another number of them."""
    model = models["qwen2"]
    if patched:
        fmd_ext.patch(model, fork_layers=2)
    inputs = build(model, "mixed")
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    together = model.generate(**inputs, **options, num_beams=2, num_return_sequences=2)[:, length:]
    for row, conversation in enumerate(BATCHES["mixed"]):
        alone = prepare_batch(processor_of(model), [conversation])
        own = model.generate(**alone, **options, num_beams=2, num_return_sequences=2)
        assert together[2 * row : 2 * row + 2].tolist() == own[:, alone["input_ids"].shape[1] :].tolist()


def test_a_second_turn_on_one_cache(models):
    model = models["qwen2"]
    fmd_ext.patch(model, fork_layers=2)
    inputs = build(model, "one")
    first = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    more = torch.tensor([[20, 30, 40]])
    ids = torch.cat([first.sequences, more], dim=1)
    both = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    whole = model(**both, logits_to_keep=1).logits
    cache = first.past_key_values
    rest = ids[:, cache.get_seq_length() :]
    onward = model(input_ids=rest, attention_mask=both["attention_mask"], past_key_values=cache, logits_to_keep=1)
    torch.testing.assert_close(onward.logits, whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_ask_answers_from_an_official_folder(tmp_path, capsys, kind):
    folder = write_official_folder(tmp_path / "model", kind)
    command = ["ask", str(CLIP), "What?", "--model", str(folder), "--max-new-tokens", "4"]
    assert main([*command, "--compare", "--fork-layers", "3", "--masking", "attention"]) == 0
    out, _ = capsys.readouterr()
    assert "3 of 3 layers forked, masking attention" in out
    assert main([*command, "--vanilla", "--fps", "1"]) == 0
    assert "the model takes 4 frames of any clip" in capsys.readouterr().err


def test_verify_takes_an_official_folder(tmp_path, capsys):
    folder = write_official_folder(tmp_path / "model", "qwen2")
    assert main(["verify", str(CLIP), "--model", str(folder), "--fork-layers", "2", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.count("equal") >= 2


@pytest.mark.parametrize(
    "gone, extra, said",
    [
        ("model.norm.weight", [], "it lacks 1 tensors: model.norm.weight"),
        (None, ["--interleaved"], "it cannot interleave picture and sound"),
        (None, ["--max-frame-pixels", "9"], "sees frames of one size only"),
    ],
)
def test_ask_refuses_in_one_line(tmp_path, capsys, gone, extra, said):
    state = {name: tensor for name, tensor in official_state("qwen2").items() if name != gone}
    folder = write_official_folder(tmp_path / "model", "qwen2", state)
    assert main(["ask", str(CLIP), "What?", "--model", str(folder), *extra]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]

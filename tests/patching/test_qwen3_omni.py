"""Qwen3-Omni: experts, interleaved M-RoPE, and visual features that the decoder adds after its early layers."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

import fmd_ext
from fmd_ext import FMDConfig
from fmd_ext.cli import main
from fmd_ext.engine.reference import decoder_inputs, reference_generate, reference_hidden, reference_logits
from fmd_ext.inputs.chat import prepare_inputs
from fmd_ext.inputs.media import load_clip
from fmd_ext.lab.tiny import TOKEN_IDS, save_random_model, write_clip
from fmd_ext.lab.tiny.processor import tiny_qwen3_processor
from fmd_ext.lab.tiny.qwen3_omni import tiny_qwen3_omni, tiny_qwen3_thinker
from omni_inputs import (
    AUDIO_ONLY,
    AUDIO_VIDEO,
    INTERLEAVED,
    QWEN3,
    TEXT_ONLY,
    TWO_CLIPS,
    VIDEO_AUDIO,
    VIDEO_ONLY,
    WITH_IMAGE,
)
from omni_inputs import build_inputs as build

BATCHES = {
    "separate": [VIDEO_AUDIO],
    "interleaved": [INTERLEAVED],
    "images and videos, padded": [WITH_IMAGE, TWO_CLIPS],
    "mixed": [VIDEO_AUDIO, TEXT_ONLY, AUDIO_VIDEO],
    "one modality beside a fork": [VIDEO_ONLY, AUDIO_VIDEO, AUDIO_ONLY],
    "interleaved beside text": [INTERLEAVED, TEXT_ONLY],
}


def build_inputs(samples, **options):
    return build(samples, family=QWEN3, **options)


@pytest.fixture(scope="module")
def _model():
    return tiny_qwen3_thinker(seed=0)


@pytest.fixture
def model(_model):
    """4 layers; the decoder adds visual features after the first two."""
    yield _model
    if fmd_ext.handle_of(_model) is not None:
        fmd_ext.unpatch(_model)


def resolved(**settings):
    return FMDConfig(**settings).resolve(FMDConfig(), 4)


@pytest.mark.parametrize("fork_layers", [0, 1, 2, 4])
@pytest.mark.parametrize("masking", ["zero", "attention"])
@pytest.mark.parametrize("batch", BATCHES)
def test_logits_equal_the_reference(model, batch, masking, fork_layers):
    inputs = build_inputs(BATCHES[batch])
    config = resolved(fork_layers=fork_layers, masking=masking, alpha=0.7, text_weight=0.4)
    expected = reference_logits(model, config, **inputs)
    fmd_ext.patch(model, config)
    keep = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[keep], expected[keep], atol=1e-4, rtol=0)


@pytest.mark.parametrize("mask_scale", [0.3, 1.0])
def test_soft_masking_scales_the_added_features_too(model, mask_scale):
    inputs = build_inputs([VIDEO_AUDIO, AUDIO_VIDEO], padding="right")
    config = resolved(fork_layers=3, mask_scale=mask_scale)
    keep = inputs["attention_mask"].bool()
    expected = model(**inputs).logits if mask_scale == 1.0 else reference_logits(model, config, **inputs)
    fmd_ext.patch(model, config)
    torch.testing.assert_close(model(**inputs).logits[keep], expected[keep], atol=1e-4, rtol=0)


def test_the_added_features_matter(model):
    """Guards the other tests: features in the wrong rows, or in none, would be seen."""
    inputs = build_inputs([VIDEO_AUDIO])
    config = resolved(fork_layers=2)
    given = decoder_inputs(model, **inputs)
    assert given["deepstack"].shape[0] == 2
    whole = reference_hidden(model.get_decoder(), config, **given)
    for wrong in (given["deepstack"].roll(1, dims=2), None, given["deepstack"].flip(0)):
        other = reference_hidden(model.get_decoder(), config, **{**given, "deepstack": wrong})
        assert (other - whole)[:, -1].abs().max() > 0.02


def test_an_unforked_sample_is_vanilla(model):
    for samples in ([VIDEO_ONLY], [WITH_IMAGE[:2]], [TEXT_ONLY]):
        inputs = build_inputs(samples)
        vanilla = model(**inputs).logits
        with fmd_ext.patch(model, fork_layers=2) as handle:
            torch.testing.assert_close(model(**inputs).logits, vanilla, atol=1e-4, rtol=0)
            assert handle.last_call.plan.num_away == 0
        assert torch.equal(model(**inputs).logits, vanilla)


@pytest.mark.parametrize("fork_layers", [2, 3])
@pytest.mark.parametrize("masking", ["zero", "attention"])
@pytest.mark.parametrize("batch", ["separate", "interleaved", "mixed"])
def test_greedy_tokens_equal_the_reference(model, batch, masking, fork_layers):
    inputs = build_inputs(BATCHES[batch])
    config = resolved(fork_layers=fork_layers, masking=masking, alpha=0.7)
    expected = reference_generate(model, config, 8, **inputs)
    fmd_ext.patch(model, config, runner=fork_layers == 3)
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert out[:, inputs["input_ids"].shape[1] :].tolist() == expected.tolist()


@pytest.mark.parametrize("fork_layers", [1, 2, 3])
def test_hidden_states_equal_the_reference(model, fork_layers):
    inputs = build_inputs([VIDEO_AUDIO, TEXT_ONLY])
    config = resolved(fork_layers=fork_layers, alpha=0.7)
    expected = reference_hidden(model.get_decoder(), config, **decoder_inputs(model, **inputs), hidden_states=True)
    fmd_ext.patch(model, config)
    actual = model(**inputs, output_hidden_states=True).hidden_states
    keep = inputs["attention_mask"].bool()
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        bound = 1e-5 * e[keep].abs().max().item()
        torch.testing.assert_close(a[keep], e[keep], atol=bound, rtol=0, msg=lambda m, i=i: f"state {i}: {m}")


def test_speech_out_of_the_full_model():
    """The full model is patched in its thinker; its talker reads the forked hidden states."""
    full = tiny_qwen3_omni(seed=0)
    # In transformers 5.23 the talker looks for the length of the sound's windows in its own config, which has none.
    full.talker.config.audio_config = full.thinker.config.audio_config
    inputs = build_inputs([VIDEO_AUDIO])
    turns = [TOKEN_IDS["im_start_token"], full.config.user_token_id]
    answer = [TOKEN_IDS["im_start_token"], full.config.assistant_token_id]
    ids = torch.cat([torch.tensor([turns]), inputs["input_ids"], torch.tensor([answer])], dim=1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    lengths = {"thinker_max_new_tokens": 6, "talker_max_new_tokens": 4}

    heard = []
    hook = full.talker.hidden_projection.register_forward_pre_hook(lambda module, args: heard.append(args[0]))

    def speak():
        return full.generate(
            **inputs, **lengths, thinker_do_sample=False, talker_do_sample=False, return_audio=True,
            thinker_eos_token_id=None,
        )  # fmt: skip

    _, vanilla_speech = speak()
    fmd_ext.patch(full, fork_layers=2)
    text, speech = speak()
    alone = full.thinker.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert getattr(text, "sequences", text).tolist() == alone.tolist()
    assert speech.numel() > 0 and torch.isfinite(speech).all()
    fmd_ext.unpatch(full)
    assert torch.equal(speak()[1], vanilla_speech)
    hook.remove()
    vanilla, forked, again = heard  # hidden states of the clip's positions
    assert (forked - vanilla).abs().max() > 0.1 and torch.equal(again, vanilla)


@pytest.mark.parametrize("speech", [False, True], ids=["thinker", "full model"])
def test_a_folder_answers_through_the_command_line(tmp_path, capsys, speech):
    """Picture and sound interleaved, by the family's own processor; of the full model the thinker is loaded."""
    pytest.importorskip("torchvision")
    save_random_model(tmp_path / "model", seed=1, family="qwen3_omni", speech=speech)
    clip = write_clip(tmp_path / "clip.mp4", seconds=1.0)
    options = ["--max-new-tokens", "6", "--max-frame-pixels", "4096", "--fork-layers", "2", "--interleaved"]
    assert main(["ask", str(clip), "What?", "--model", str(tmp_path / "model"), *options]) == 0
    thinker = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(tmp_path / "model")
    processor = tiny_qwen3_processor()
    pixels = {"frame_pixels": (4096, 4096), "use_audio_in_video": True}
    inputs = prepare_inputs(processor, load_clip(clip), "What?", **pixels)
    handle = fmd_ext.patch(thinker, fork_layers=2)
    ids = thinker.generate(**inputs, max_new_tokens=6, do_sample=False)
    answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert handle.last_call.plan.forked.all() and answer.strip() in capsys.readouterr().out

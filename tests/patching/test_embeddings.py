"""Embeddings instead of ids: labels are read off them where features come along; nothing stays unforked in silence."""

from __future__ import annotations

import pytest
import torch

import fmd_ext
from fmd_ext.engine.reference import decoder_inputs
from omni_inputs import AUDIO_VIDEO, TEXT_ONLY, VIDEO_AUDIO, VIDEO_ONLY, build_inputs

GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


def as_embeds(thinker, inputs):
    """The same call with the placeholders' embeddings in place of their ids."""
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    return {"inputs_embeds": thinker.get_input_embeddings()(inputs["input_ids"]), **rest}


@pytest.mark.parametrize("samples", [[VIDEO_AUDIO], [AUDIO_VIDEO, TEXT_ONLY, VIDEO_ONLY]], ids=["one", "mixed"])
def test_features_fork_without_ids(thinker, samples):
    inputs = build_inputs(samples)
    # Positions by hand: without ids transformers counts them otherwise, patched or not.
    inputs["position_ids"] = decoder_inputs(thinker, **inputs)["position_ids"][-3:]
    handle = fmd_ext.patch(thinker, fork_layers=2)
    expected, tokens = thinker(**inputs).logits, thinker.generate(**inputs, **GREEDY)[:, -4:]
    forked = handle.last_call.plan.forked
    thinker(input_ids=torch.tensor([[30]]))
    assert not handle.last_call.plan.forked.any()
    assert torch.equal(thinker(**as_embeds(thinker, inputs)).logits, expected)
    assert handle.last_call.plan.forked.tolist() == forked.tolist()
    assert torch.equal(thinker.generate(**as_embeds(thinker, inputs), **GREEDY)[:, -4:], tokens)


def test_features_without_a_placeholder_are_refused(thinker):
    inputs = build_inputs([VIDEO_AUDIO])
    embeds = decoder_inputs(thinker, **inputs)["inputs_embeds"]  # the features are in place already
    fmd_ext.patch(thinker, fork_layers=2)
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    with pytest.raises(ValueError, match="input_features, pixel_values_videos came with inputs_embeds in which no pos"):
        thinker(inputs_embeds=embeds, **rest)


def test_embeddings_alone_are_text_and_that_is_said_once(thinker, caplog):
    inputs = build_inputs([VIDEO_AUDIO])
    embeds, mask = decoder_inputs(thinker, **inputs)["inputs_embeds"], inputs["attention_mask"]
    labels = decoder_inputs(thinker, **inputs)["labels"]
    handle = fmd_ext.patch(thinker, fork_layers=2)
    thinker(inputs_embeds=embeds, attention_mask=mask, modality_labels=labels)
    assert handle.last_call.plan.forked.all() and caplog.text == ""
    for _ in range(2):
        thinker(inputs_embeds=embeds, attention_mask=mask)
        assert not handle.last_call.plan.forked.any()
    assert caplog.text.count("nothing is forked; give modality_labels where they hold a clip") == 1


def test_labels_of_another_length_are_refused(thinker):
    inputs = build_inputs([VIDEO_AUDIO])
    labels = torch.zeros(1, 30, dtype=torch.long)
    fmd_ext.patch(thinker, fork_layers=2)
    with pytest.raises(ValueError, match="modality_labels are for 30 positions, the sequence has 31"):
        thinker(**inputs, modality_labels=labels)
    for given in (labels, torch.zeros(1, 32, dtype=torch.long)):
        with pytest.raises(ValueError, match=f"for {given.shape[1]} positions, the prompt has 31: label every one"):
            thinker.generate(**inputs, **GREEDY, modality_labels=given)
    decoder = thinker.get_decoder()
    with pytest.raises(ValueError, match="for 30 positions, the sequence has 31"):
        decoder(inputs_embeds=torch.zeros(1, 31, 256), modality_labels=labels)

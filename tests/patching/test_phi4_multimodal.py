"""Phi-4-multimodal: images and speech, in a decoder that puts the features in place itself."""

from __future__ import annotations

import pytest
import torch

import fmd_ext
from fmd_ext import FMDConfig
from fmd_ext.engine.reference import reference_generate, reference_logits
from phi4_inputs import batch, tiny_phi4


@pytest.fixture(scope="module")
def _model():
    return tiny_phi4()


@pytest.fixture
def model(_model):
    yield _model
    if fmd_ext.handle_of(_model) is not None:
        fmd_ext.unpatch(_model)


@pytest.mark.parametrize("masking", ["zero", "attention"])
@pytest.mark.parametrize("fork_layers", [1, 2, 4])
def test_logits_and_tokens_equal_the_reference(model, masking, fork_layers):
    inputs = batch()
    keep = inputs["attention_mask"].bool()
    config = FMDConfig(fork_layers=fork_layers, masking=masking, alpha=0.7).resolve(FMDConfig(), 4)
    vanilla = model(**inputs).logits[keep]
    expected, tokens = reference_logits(model, config, **inputs), reference_generate(model, config, 6, **inputs)
    assert (expected[keep] - vanilla).abs().max() > 0.1
    handle = fmd_ext.patch(model, config, runner=fork_layers == 2)
    torch.testing.assert_close(model(**inputs).logits[keep], expected[keep], atol=1e-4, rtol=0)
    assert handle.last_call.plan.forked.all()
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert out[:, -6:].tolist() == tokens.tolist()


@pytest.mark.parametrize("kinds", [{"speech": False}, {"image": False}, {"image": False, "speech": False}], ids=str)
def test_a_sample_without_both_is_vanilla(model, kinds):
    inputs = batch(**kinds)
    keep = inputs["attention_mask"].bool()
    vanilla = model(**inputs).logits
    with fmd_ext.patch(model, fork_layers=2) as handle:
        torch.testing.assert_close(model(**inputs).logits[keep], vanilla[keep], atol=1e-4, rtol=0)
        assert handle.last_call.plan.num_away == 0
    assert torch.equal(model(**inputs).logits, vanilla)


def test_a_window_within_the_context_is_refused(model):
    config = model.model.config
    config.sliding_window = config.max_position_embeddings - 1
    try:
        with pytest.raises(TypeError, match="sliding window of 255"):
            fmd_ext.patch(model)
    finally:
        config.sliding_window = config.max_position_embeddings

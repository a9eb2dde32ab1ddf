"""torch.compile of a patched model, of its parts, before and after the patch: same numbers, graphs in between."""

from __future__ import annotations

import pytest
import torch

import fmd_ext
from fmd_ext import FMDConfig
from fmd_ext.engine.reference import reference_logits
from fmd_ext.lab.tiny import tiny_thinker
from omni_inputs import VIDEO_AUDIO, build_inputs

CONFIG = FMDConfig(fork_layers=2, masking="zero", alpha=0.7).resolve(FMDConfig(), 4)
BACKEND = {"backend": "eager"}  # what Dynamo cuts out runs as it is: no compiler is needed


def whole_model(model):
    model.compile(**BACKEND)
    return model


def whole_model_by_function(model):
    return torch.compile(model, **BACKEND)


def forward_of_the_model(model):
    model.forward = torch.compile(model.forward, **BACKEND)
    return model


def layers(model):
    for layer in model.get_decoder().layers:
        layer.compile(**BACKEND)
    return model


def forwards_of_the_layers(model):
    for layer in model.get_decoder().layers:
        layer.forward = torch.compile(layer.forward, **BACKEND)
    return model


def attention_and_mlps(model):
    for layer in model.get_decoder().layers:
        layer.self_attn.compile(**BACKEND)
        layer.mlp.compile(**BACKEND)
    return model


WAYS = [whole_model, whole_model_by_function, forward_of_the_model, layers, forwards_of_the_layers, attention_and_mlps]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_compiled_patched_model(way, caplog):
    inputs, model = build_inputs([VIDEO_AUDIO]), tiny_thinker(seed=0)
    vanilla, expected = model(**inputs).logits, reference_logits(model, CONFIG, **inputs)
    handle = fmd_ext.patch(model, CONFIG)
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
    torch._dynamo.utils.counters.clear()
    compiled = way(model)
    for _ in range(2):
        torch.testing.assert_close(compiled(**inputs).logits, expected, atol=1e-4, rtol=0)
    assert handle.is_in_force and handle.last_call.plan.forked.all()
    parts_alone = "layers" in way.__name__ or "mlps" in way.__name__
    assert ("torch.compile does not compile the forward" in caplog.text) is not parts_alone
    if parts_alone:
        assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert torch.equal(out, tokens)
    handle.unpatch()
    torch.testing.assert_close(compiled(**inputs).logits, vanilla, atol=1e-5, rtol=0)


def test_a_model_that_was_compiled_before():
    inputs, model = build_inputs([VIDEO_AUDIO]), tiny_thinker(seed=0)
    vanilla, expected = model(**inputs).logits, reference_logits(model, CONFIG, **inputs)
    model.compile(**BACKEND)
    model(**inputs)
    with fmd_ext.patch(model, CONFIG):
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model(**inputs).logits, vanilla, atol=1e-5, rtol=0)


def test_two_patched_models_and_an_unpatched_one():
    """They share code objects, by which Dynamo keeps what it has compiled."""
    inputs = build_inputs([VIDEO_AUDIO])
    one, other, plain = (tiny_thinker(seed=seed) for seed in (0, 1, 2))
    expected = [reference_logits(one, CONFIG, **inputs), reference_logits(other, CONFIG, **inputs)]
    expected.append(plain(**inputs).logits)
    for model in (one, other):
        fmd_ext.patch(model, CONFIG)
    for model, logits in zip((one, other, plain), expected, strict=True):
        torch.testing.assert_close(layers(model)(**inputs).logits, logits, atol=1e-4, rtol=0)

"""The append takes over the rotation of queries and keys: same results, the model's own code otherwise, no trace."""

from __future__ import annotations

import copy
import dataclasses
import sys

import pytest
import torch

import fmd_ext
from fmd_ext import ops
from fmd_ext.adapters.qwen2_5_omni import QWEN2_5_OMNI
from omni_inputs import TEXT_ONLY, VIDEO_AUDIO, WITH_IMAGE, build_inputs

UNFUSED = dataclasses.replace(QWEN2_5_OMNI, rotary="")
GENERATE = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def rotations(monkeypatch):
    """Grows by an entry with every call of the fused op."""
    calls, original = [], ops.rope_append_

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(ops, "rope_append_", counted)
    return calls


def attention_of(thinker, layer=0):
    return QWEN2_5_OMNI.find_decoder(thinker).layers[layer].self_attn


def source_of(module):
    return sys.modules[type(module).__module__]


@pytest.mark.parametrize("masking", ["zero", "attention"])
@pytest.mark.parametrize("samples", [[VIDEO_AUDIO], [WITH_IMAGE, TEXT_ONLY]], ids=["one", "padded"])
def test_same_logits_as_with_the_models_own_rotation(thinker, masking, samples, rotations):
    inputs = build_inputs(samples)
    with fmd_ext.patch(thinker, fork_layers=2, masking=masking) as handle:
        assert handle.fusions["rotation"].why_not == ""
        fused = thinker(**inputs).logits
        tokens = thinker.generate(**inputs, **GENERATE)
    assert len(rotations) == 4 + 4 * 4  # layers of one call, and of four steps
    with fmd_ext.patch(thinker, adapter=UNFUSED, fork_layers=2, masking=masking) as handle:
        assert "adapter" in handle.fusions["rotation"].why_not
        torch.testing.assert_close(fused, thinker(**inputs).logits, atol=1e-5, rtol=0)
        assert torch.equal(tokens, thinker.generate(**inputs, **GENERATE))
    assert len(rotations) == 20


def test_nothing_of_it_stays_and_nobody_else_sees_it(thinker, rotations):
    attention, function = attention_of(thinker), source_of(attention_of(thinker)).apply_rotary_pos_emb
    other, inputs = copy.deepcopy(thinker), build_inputs([VIDEO_AUDIO])
    expected = other(**inputs).logits
    with fmd_ext.patch(thinker, fork_layers=1):
        assert "forward" in attention.__dict__
        assert source_of(attention).apply_rotary_pos_emb is function
        assert torch.equal(other(**inputs).logits, expected) and not rotations
    assert "forward" not in attention.__dict__
    assert torch.equal(thinker(**inputs).logits, expected)


def test_a_copy_rotates_for_itself(thinker, rotations):
    inputs = build_inputs([VIDEO_AUDIO])
    handle = fmd_ext.patch(thinker, fork_layers=2)
    expected = thinker(**inputs).logits
    twin = copy.deepcopy(thinker)
    assert torch.equal(twin(**inputs).logits, expected)
    assert len(rotations) == 8 and handle.session.call is None
    defer = [m.__dict__["_fmd_overrides"]["forward"]._forward.__globals__ for m in map(attention_of, (thinker, twin))]
    assert defer[0]["apply_rotary_pos_emb"].__self__.session is handle.session
    assert defer[1]["apply_rotary_pos_emb"].__self__.session is fmd_ext.handle_of(twin).session


def test_what_a_hook_keeps_stays_what_it_saw(thinker):
    kept = []
    projection = attention_of(thinker).q_proj
    hook = projection.register_forward_hook(lambda module, args, out: kept.append((out, out.clone())))
    try:
        with fmd_ext.patch(thinker, fork_layers=2):
            thinker(**build_inputs([VIDEO_AUDIO]))
    finally:
        hook.remove()
    assert len(kept) == 1 and torch.equal(*kept[0])


def test_another_rotation_is_left_to_the_model(thinker, rotations, monkeypatch):
    def pairs(q, k, cos, sin, unsqueeze_dim=1):
        """Rotates neighbours, not halves."""
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return tuple(x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin for x in (q, k))

    inputs = build_inputs([VIDEO_AUDIO])
    with monkeypatch.context() as change:
        change.setattr(source_of(attention_of(thinker)), "apply_rotary_pos_emb", pairs)
        expected = thinker(**inputs).logits
        with fmd_ext.patch(thinker, fork_layers=1, masking="zero", mask_scale=1.0) as handle:
            assert "rotates in another way" in handle.fusions["rotation"].why_not
            torch.testing.assert_close(thinker(**inputs).logits, expected, atol=1e-4, rtol=0)
    assert not rotations
    assert not torch.allclose(thinker(**inputs).logits, expected, atol=1e-2)


def test_a_replaced_forward_is_left_alone(thinker, rotations):
    attention, seen = attention_of(thinker, 1), []
    original = attention.forward

    def replaced(*args, **kwargs):
        seen.append(1)
        return original(*args, **kwargs)

    attention.forward = replaced
    try:
        with fmd_ext.patch(thinker, fork_layers=2) as handle:
            assert "replaced the forward" in handle.fusions["rotation"].why_not
            thinker(**build_inputs([VIDEO_AUDIO]))
        assert attention.__dict__["forward"] is replaced
    finally:
        del attention.forward
    assert seen == [1] and len(rotations) == 3


def test_arguments_that_the_op_does_not_have_go_to_the_model(thinker, rotations):
    with fmd_ext.patch(thinker, fork_layers=2):
        inputs = build_inputs([VIDEO_AUDIO])
        expected = thinker(**inputs).logits
        attention = attention_of(thinker)
        names = attention.__dict__["_fmd_overrides"]["forward"]._forward.__globals__
        defer = names["apply_rotary_pos_emb"]
        names["apply_rotary_pos_emb"] = lambda q, k, cos, sin: defer(q, k, cos, sin, unsqueeze_dim=1)
        rotations.clear()
        torch.testing.assert_close(thinker(**inputs).logits, expected, atol=1e-5, rtol=0)
    assert len(rotations) == 3


def test_keys_changed_after_their_rotation_are_an_error(thinker):
    """An adapter that names `rotary` for such a model is wrong; nothing half-rotated gets through."""
    inputs = build_inputs([VIDEO_AUDIO])
    expected = thinker(**inputs).logits
    with fmd_ext.patch(thinker, fork_layers=2):
        fused = thinker(**inputs).logits
        names = attention_of(thinker).__dict__["_fmd_overrides"]["forward"]._forward.__globals__
        defer = names["apply_rotary_pos_emb"]
        names["apply_rotary_pos_emb"] = lambda *args: [x + 0 for x in defer(*args)]
        with pytest.raises(RuntimeError, match="changes its keys after their rotation"):
            thinker(**inputs)
        names["apply_rotary_pos_emb"] = defer
        assert torch.equal(thinker(**inputs).logits, fused)
    assert torch.equal(thinker(**inputs).logits, expected)

"""Bad input: a clear error, and the model as it was."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache

import fmd_ext
from fmd_ext.lab.tiny import tiny_thinker
from omni_inputs import VIDEO_AUDIO, build_inputs


def test_unsupported_model():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    with pytest.raises(TypeError, match="no adapter for GPT2LMHeadModel.*qwen2_5_omni.*adapter='text'"):
        fmd_ext.patch(model)
    with pytest.raises(TypeError, match="no module with 'layers'"):
        fmd_ext.patch(model, adapter="text")
    assert fmd_ext.handle_of(model) is None


def test_unknown_adapter(thinker):
    with pytest.raises(ValueError, match="unknown adapter 'qwen'; the adapters are .*'qwen2_5_omni', .*'text'"):
        fmd_ext.patch(thinker, adapter="qwen")


@pytest.mark.parametrize(
    ("arguments", "settings", "says"),
    [
        (({"alpha": 0.5},), {}, "config must be an FMDConfig, got {'alpha': 0.5}; single settings are given by name"),
        ((), {"runner": "yes"}, "runner must be True, False or None, got 'yes'"),
        ((), {"fork_layer": 2}, "unknown FMD setting 'fork_layer'; the settings are fork_layers"),
    ],
)
def test_arguments_of_the_wrong_type(thinker, arguments, settings, says):
    with pytest.raises(TypeError, match=says):
        fmd_ext.patch(thinker, *arguments, **settings)
    assert fmd_ext.handle_of(thinker) is None


@pytest.mark.parametrize("settings", [{"fork_layers": 5}, {"alpha": 2}, {"masking": "off"}])
def test_bad_settings_leave_the_model_alone(thinker, settings):
    forward = thinker.forward
    with pytest.raises(ValueError):
        fmd_ext.patch(thinker, **settings)
    assert thinker.forward == forward and fmd_ext.handle_of(thinker) is None


def test_a_decoder_that_turns_out_unsupported_is_not_half_patched(thinker):
    config = thinker.get_decoder().config
    config.layer_types[1] = "sliding_attention"
    try:
        with pytest.raises(TypeError, match="layers of type sliding_attention; only full attention"):
            fmd_ext.patch(thinker)
        assert fmd_ext.handle_of(thinker) is None and "forward" not in thinker.get_decoder().__dict__
    finally:
        config.layer_types[1] = "full_attention"


@pytest.mark.parametrize(
    ("labels", "error", "says"),
    [
        (torch.zeros(1, 3, 1, dtype=torch.long), ValueError, r"got shape \[1, 3, 1\]"),
        (torch.full((1, 31), 4), ValueError, r"0 text, 1 visual, 2 audio, 3 joint, -1 padding; got \[4\]"),
        (torch.zeros(1, 31), TypeError, "got dtype float32"),
        ([["text", "audio"]], TypeError, "got dtype"),
        ([[0, 1], [2]], ValueError, "got rows of unequal length"),
        (torch.zeros(0, 5, dtype=torch.long), ValueError, r"got shape \[0, 5\]"),
    ],
)
def test_bad_labels(thinker, labels, error, says):
    fmd_ext.patch(thinker)
    with pytest.raises(error, match=says):
        thinker(**build_inputs([VIDEO_AUDIO]), modality_labels=labels)


def test_labels_for_another_batch(thinker):
    fmd_ext.patch(thinker)
    with pytest.raises(ValueError, match="modality_labels are for 2 samples, the call has 1"):
        thinker(**build_inputs([VIDEO_AUDIO]), modality_labels=torch.zeros(2, 31, dtype=torch.long))


def test_training_with_gradients(thinker):
    inputs = build_inputs([VIDEO_AUDIO])
    fmd_ext.patch(thinker)
    thinker.train()
    try:
        with torch.enable_grad(), pytest.raises(RuntimeError, match="inference-only"):
            thinker(**inputs)
    finally:
        thinker.eval()
    with torch.enable_grad():
        assert not thinker(**inputs).logits.requires_grad  # in eval mode it runs, without a graph
        embeds = torch.randn(1, 4, 256, requires_grad=True)
        with pytest.raises(RuntimeError, match="inference-only"):
            thinker.get_decoder()(inputs_embeds=embeds)


def test_context_beyond_the_limit():
    model = tiny_thinker(seed=0, max_position_embeddings=32)
    fmd_ext.patch(model)
    inputs = build_inputs([VIDEO_AUDIO])  # 31 positions
    assert model.generate(**inputs, max_new_tokens=1).shape[1] == 32
    with pytest.raises(ValueError, match="the context would be 33 positions long; the model's limit is 32"):
        model.generate(**inputs, max_new_tokens=8, eos_token_id=None)


def test_caches_that_cannot_be_used(thinker):
    inputs = build_inputs([VIDEO_AUDIO])
    filled = thinker(**inputs).past_key_values
    fmd_ext.patch(thinker)
    with pytest.raises(ValueError, match="already holds 31 positions from an unpatched model"):
        thinker(input_ids=torch.tensor([[30]]), past_key_values=filled)
    ours = thinker(**inputs).past_key_values
    static = StaticCache(config=thinker.get_decoder().config, max_cache_len=64)
    with pytest.raises(TypeError, match="got StaticCache"):
        thinker(**inputs, past_key_values=static)
    with pytest.raises(TypeError, match="Static, compiled, quantized"):
        thinker.generate(**inputs, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(TypeError, match="with offloading"):
        offloaded = DynamicCache()
        offloaded.offloading = True  # its constructor wants a device where torch is a CUDA build
        thinker(**inputs, past_key_values=offloaded)
    fmd_ext.unpatch(thinker)
    with pytest.raises(RuntimeError, match="cannot be used by another model or after unpatch"):
        thinker(input_ids=torch.tensor([[30]]), past_key_values=ours)
    fmd_ext.patch(thinker, fork_layers=2)
    with pytest.raises(ValueError, match="filled by another patched model, or before the model was patched again"):
        thinker(input_ids=torch.tensor([[30]]), past_key_values=ours)


def test_a_cache_for_another_batch(thinker):
    fmd_ext.patch(thinker)
    cache = thinker(**build_inputs([VIDEO_AUDIO])).past_key_values
    with pytest.raises(ValueError, match="the cache holds 1 samples, the call has 2"):
        thinker(input_ids=torch.tensor([[30], [31]]), past_key_values=cache)


def test_attention_masks_that_cannot_be_used(thinker):
    inputs = build_inputs([VIDEO_AUDIO])
    fmd_ext.patch(thinker)
    cache = thinker(**inputs).past_key_values
    mask = torch.ones(1, 34, dtype=torch.long)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="what was cached cannot be changed"):
        thinker(input_ids=torch.tensor([[30, 31, 32]]), attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match=r"must be \[1, 34\].*got \[1, 40\]"):
        thinker.get_decoder()(
            input_ids=torch.tensor([[30, 31, 32]]), attention_mask=torch.ones(1, 40), past_key_values=cache
        )
    with pytest.raises(ValueError, match=r"takes a 2D attention_mask \[batch, length\], got \[1, 1, 3, 3\]"):
        thinker.get_decoder()(inputs_embeds=torch.zeros(1, 3, 256), attention_mask=torch.zeros(1, 1, 3, 3))
    assert cache.get_seq_length() == 31


def test_attention_weights_are_refused(thinker):
    fmd_ext.patch(thinker)
    with pytest.raises(ValueError, match="no attention weights to return.*attention_share"):
        thinker(**build_inputs([VIDEO_AUDIO]), output_attentions=True)


def test_dtypes_that_do_not_mix(thinker):
    fmd_ext.patch(thinker)
    cache = thinker(**build_inputs([VIDEO_AUDIO])).past_key_values
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.double().bfloat16(), layer.values.bfloat16()
    with pytest.raises(ValueError, match="append_: k has dtype Float, accepted is BFloat16"):
        thinker(input_ids=torch.tensor([[30]]), past_key_values=cache)


def test_a_failed_call_leaves_the_cache_as_it_was(thinker):
    inputs = build_inputs([VIDEO_AUDIO])
    fmd_ext.patch(thinker)
    cache = thinker(**inputs).past_key_values
    step = {"input_ids": torch.tensor([[30]]), "past_key_values": cache}
    hook = thinker.get_decoder().layers[2].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        thinker(**step)
    hook.remove()
    assert cache.get_seq_length() == 31
    ids = torch.cat([inputs["input_ids"], step["input_ids"]], dim=1)
    whole = thinker(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[:, -1]
    torch.testing.assert_close(thinker(**step).logits[:, -1], whole, atol=1e-4, rtol=0)


def test_a_failed_first_call_leaves_the_cache_empty(thinker):
    """The cache then takes a batch of another size."""
    fmd_ext.patch(thinker)
    cache = DynamicCache()
    hook = thinker.get_decoder().layers[2].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        thinker(**build_inputs([VIDEO_AUDIO]), past_key_values=cache)
    hook.remove()
    inputs = build_inputs([VIDEO_AUDIO, VIDEO_AUDIO])
    expected = thinker(**inputs).logits
    assert torch.equal(thinker(**inputs, past_key_values=cache).logits, expected)

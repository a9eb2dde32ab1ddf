"""Identities 1 to 5 of the method on single forward calls, and what patch leaves behind (nothing)."""

from __future__ import annotations

import copy
import gc
import inspect
import subprocess
import sys
import weakref

import pytest
import torch

import fmd_ext
from fmd_ext import FMDConfig
from fmd_ext.engine.reference import decoder_inputs, reference_hidden, reference_logits
from fmd_ext.lab.tiny import TOKEN_IDS, tiny_thinker
from omni_inputs import (
    AUDIO_ONLY,
    AUDIO_VIDEO,
    INTERLEAVED,
    TEXT_ONLY,
    TWO_CLIPS,
    VIDEO_AUDIO,
    VIDEO_ONLY,
    WITH_IMAGE,
    build_inputs,
)
from traces import snapshot

BATCHES = {
    "separate": [VIDEO_AUDIO],
    "interleaved": [INTERLEAVED],
    "two clips": [TWO_CLIPS],
    "padded pair": [WITH_IMAGE, TWO_CLIPS],
    "padded interleaved": [INTERLEAVED, TEXT_ONLY],
    "mixed": [VIDEO_AUDIO, TEXT_ONLY, AUDIO_VIDEO],
    "one modality beside a fork": [VIDEO_ONLY, AUDIO_VIDEO, AUDIO_ONLY],
}


def logits_and_reference(thinker, samples, padding="left", **settings):
    """Logits at real positions, patched and by the reference."""
    inputs = build_inputs(samples, padding=padding)
    config = FMDConfig(**settings).resolve(FMDConfig(), num_layers=4)
    expected = reference_logits(thinker, config, **inputs)
    fmd_ext.patch(thinker, config)
    actual = thinker(**inputs).logits
    keep = inputs["attention_mask"].bool()
    return actual[keep], expected[keep]


@pytest.mark.parametrize("fork_layers", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("masking", ["zero", "attention"])
@pytest.mark.parametrize("batch", BATCHES)
def test_logits_equal_the_reference(thinker, batch, masking, fork_layers):
    actual, expected = logits_and_reference(
        thinker, BATCHES[batch], fork_layers=fork_layers, masking=masking, alpha=0.7, text_weight=0.4
    )
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha": 0.0, "text_weight": 0.0},
        {"alpha": 1.0, "text_weight": 1.0},
        {"alpha": {"visual": 0.9, "audio": 0.2}},
        {"mask_scale": 0.4},
        {"mask_scale": 1.0},
    ],
    ids=str,
)
def test_weights_and_soft_masking_equal_the_reference(thinker, settings):
    samples = [VIDEO_AUDIO, INTERLEAVED[:1] + AUDIO_VIDEO]
    actual, expected = logits_and_reference(thinker, samples, fork_layers=2, **settings)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_right_padding(thinker):
    actual, expected = logits_and_reference(thinker, BATCHES["mixed"], padding="right", fork_layers=2)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_forking_changes_the_logits(thinker):
    """Guards the other tests: on these inputs a fork that does nothing would be seen."""
    inputs = build_inputs([VIDEO_AUDIO])
    vanilla = thinker(**inputs).logits
    for settings in ({}, {"masking": "attention"}, {"alpha": 0.5}, {"fork_layers": 3}):
        with fmd_ext.patch(thinker, **settings):
            assert (thinker(**inputs).logits - vanilla)[:, -1].abs().max() > 0.1


def test_mask_scale_one_is_vanilla(thinker):
    """Nothing masked, both branches equal: whatever the weights, the merge returns the vanilla states."""
    inputs = build_inputs([VIDEO_AUDIO])
    vanilla = thinker(**inputs).logits
    fmd_ext.patch(thinker, mask_scale=1.0, alpha=0.3, fork_layers=3)
    torch.testing.assert_close(thinker(**inputs).logits, vanilla, atol=1e-4, rtol=0)


@pytest.mark.parametrize("samples", list(BATCHES.values()), ids=list(BATCHES))
def test_zero_fork_layers_is_vanilla_bit_for_bit(thinker, samples):
    inputs = build_inputs(samples)
    vanilla = thinker(**inputs).logits
    fmd_ext.patch(thinker, fork_layers=0)
    assert torch.equal(thinker(**inputs).logits, vanilla)


@pytest.mark.parametrize("sample", [TEXT_ONLY, VIDEO_ONLY, AUDIO_ONLY])
def test_a_sample_without_both_modalities_is_vanilla(thinker, sample):
    inputs = build_inputs([sample])
    vanilla = thinker(**inputs).logits
    handle = fmd_ext.patch(thinker, fork_layers=2)
    torch.testing.assert_close(thinker(**inputs).logits, vanilla, atol=1e-4, rtol=0)
    assert handle.last_call.plan.num_away == 0 and not handle.last_call.plan.forked.any()


@pytest.mark.parametrize("masking", ["zero", "attention"])
def test_batched_equals_one_by_one(thinker, masking):
    samples = [VIDEO_AUDIO, TEXT_ONLY, VIDEO_ONLY]
    fmd_ext.patch(thinker, masking=masking, fork_layers=2)
    together = build_inputs(samples)
    logits = thinker(**together).logits
    # The same features, sample by sample.
    video = together["pixel_values_videos"].split([32, 32])
    mask = together["attention_mask"].bool()
    alone = [
        {"pixel_values_videos": video[0], "input_features": together["input_features"]},
        {},
        {"pixel_values_videos": video[1]},
    ]
    for i, inputs in enumerate(alone):
        inputs |= {"input_ids": together["input_ids"][i : i + 1, mask[i]]}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "pixel_values_videos" in inputs:
            inputs |= {name: together[name][:1] for name in ("video_grid_thw", "video_second_per_grid")}
        if "input_features" in inputs:
            inputs["feature_attention_mask"] = together["feature_attention_mask"]
        torch.testing.assert_close(thinker(**inputs).logits[0], logits[i, mask[i]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("masking", ["zero", "attention"])
@pytest.mark.parametrize("fork_layers", [1, 3, 4])
def test_rows_are_those_of_the_design(thinker, masking, fork_layers):
    """N + T rows with attention masking, 2N - P with zero masking; none of them after the merge."""
    handle = fmd_ext.patch(thinker, masking=masking, fork_layers=fork_layers)
    seen = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
        for layer in thinker.get_decoder().layers
    ]
    inputs = build_inputs([VIDEO_AUDIO])
    thinker(**inputs)
    for hook in hooks:
        hook.remove()
    total = inputs["input_ids"].shape[1]
    prefix = 6  # five words and the begin-of-video marker
    is_text = (
        inputs["input_ids"][..., None] != torch.tensor([TOKEN_IDS["audio_token"], TOKEN_IDS["video_token"]])
    ).all(-1)
    text_after_prefix = int(is_text.sum()) - prefix
    rows = 2 * total - prefix if masking == "zero" else total + text_after_prefix
    assert seen == [rows] * fork_layers + [total] * (4 - fork_layers)
    assert (handle.last_call.plan.num_rows, handle.last_call.plan.num_home) == (rows, total)


@pytest.mark.parametrize("fork_layers", [1, 2, 4])
def test_hidden_states_equal_the_reference(thinker, fork_layers):
    inputs = build_inputs([VIDEO_AUDIO, TEXT_ONLY])
    config = FMDConfig(fork_layers=fork_layers, alpha=0.7).resolve(FMDConfig(), 4)
    decoder = thinker.get_decoder()
    expected = reference_hidden(decoder, config, **decoder_inputs(thinker, **inputs), hidden_states=True)
    fmd_ext.patch(thinker, config)
    actual = thinker(**inputs, output_hidden_states=True).hidden_states
    keep = inputs["attention_mask"].bool()
    assert len(actual) == len(expected) == 5
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        bound = 1e-5 * e[keep].abs().max().item()  # the residual stream is not of order one, unlike the logits
        torch.testing.assert_close(a[keep], e[keep], atol=bound, rtol=0, msg=lambda m, i=i: f"state {i}: {m}")


def test_tuples_and_no_cache_as_the_caller_asks(thinker):
    inputs = build_inputs([VIDEO_AUDIO])
    fmd_ext.patch(thinker)
    full = thinker(**inputs)
    assert full.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]
    assert thinker(**inputs, use_cache=False).past_key_values is None
    config = thinker.get_decoder().config
    config.use_cache = False
    assert thinker(**inputs).past_key_values is None
    config.use_cache = True
    as_tuple = thinker(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], full.logits)


@pytest.mark.parametrize("fork_layers", [0, 2, 4])
def test_unpatch_leaves_no_trace(thinker, fork_layers):
    inputs = build_inputs([VIDEO_AUDIO, TEXT_ONLY])
    vanilla = thinker(**inputs, output_hidden_states=True).logits  # transformers installs its own hooks now
    before = snapshot(thinker)
    handle = fmd_ext.patch(thinker, fork_layers=fork_layers)
    thinker(**inputs)
    handle.unpatch()
    after = snapshot(thinker)
    assert before.keys() == after.keys()
    assert [key for key in before if before[key] is not after[key] and before[key] != after[key]] == []
    assert torch.equal(thinker(**inputs).logits, vanilla)


def test_what_has_replaced_a_patched_method_is_dropped_and_told(thinker, caplog):
    """As accelerate's hooks, or a compiled forward, that came after the patch."""
    vanilla = thinker(**build_inputs([VIDEO_AUDIO])).logits
    for copied in (False, True):
        model = copy.deepcopy(thinker) if copied else thinker
        fmd_ext.patch(model, fork_layers=2)
        model = copy.deepcopy(model) if copied else model
        own = model.forward
        model.forward = lambda own=own, **kwargs: own(**kwargs)
        caplog.clear()
        fmd_ext.unpatch(model)
        assert "drops what has replaced our methods since the patch" in caplog.text
        assert "forward of Qwen2_5OmniThinkerForConditionalGeneration; set it up again" in caplog.text
        assert torch.equal(model(**build_inputs([VIDEO_AUDIO])).logits, vanilla)
        caplog.clear()
        fmd_ext.patch(model).unpatch()
        assert caplog.text == ""


def test_two_models_do_not_disturb_each_other(thinker):
    other = tiny_thinker(seed=1)
    shared = tiny_thinker(seed=2)
    shared.model.config = other.model.config
    inputs = build_inputs([VIDEO_AUDIO])
    vanilla = other(**inputs).logits
    fmd_ext.patch(thinker, fork_layers=2)
    ours = thinker(**inputs).logits
    fmd_ext.patch(shared, fork_layers=1)
    shared(**inputs)
    assert torch.equal(other(**inputs).logits, vanilla)
    assert torch.equal(thinker(**inputs).logits, ours)


def test_a_deep_copy_is_patched_by_itself(thinker):
    inputs = build_inputs([VIDEO_AUDIO])
    fmd_ext.patch(thinker, fork_layers=2)
    ours = thinker(**inputs).logits
    twin = copy.deepcopy(thinker)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
        twin.get_decoder().layers[0].mlp.down_proj.weight.zero_()
    assert twin(**inputs).logits.abs().max() == 0
    fmd_ext.unpatch(twin)
    assert torch.equal(thinker(**inputs).logits, ours)


def test_patched_models_are_collected():
    model = tiny_thinker(seed=3)
    handle = fmd_ext.patch(model)
    alive = weakref.ref(model)
    del model, handle
    gc.collect()
    assert alive() is None


def test_signatures_stay(thinker):
    before = [inspect.signature(f) for f in (thinker.forward, thinker.generate, thinker.get_decoder().forward)]
    fmd_ext.patch(thinker)
    after = [inspect.signature(f) for f in (thinker.forward, thinker.generate, thinker.get_decoder().forward)]
    assert before == after


def test_patching_twice(thinker):
    handle = fmd_ext.patch(thinker, fork_layers=2)
    assert fmd_ext.patch(thinker, fork_layers=2) is handle
    with pytest.raises(ValueError, match="patched already, with FMDConfig.*unpatch it first"):
        fmd_ext.patch(thinker, fork_layers=3)
    assert fmd_ext.handle_of(thinker) is handle
    fmd_ext.unpatch(thinker)
    with pytest.raises(ValueError, match="is not patched"):
        fmd_ext.unpatch(thinker)


def test_a_block_leaves_the_model_as_it_was_before(thinker):
    """Patched, where a caller had patched it alike; and whatever the block itself did about it."""
    outer = fmd_ext.patch(thinker, fork_layers=2)
    with fmd_ext.patch(thinker, fork_layers=2) as handle:
        assert handle is outer
    assert outer.is_in_force
    with outer:
        pass
    assert not outer.is_in_force
    with fmd_ext.patch(thinker, fork_layers=2):
        with fmd_ext.patch(thinker, fork_layers=2) as handle:
            pass
        assert handle.is_in_force
    assert fmd_ext.handle_of(thinker) is None
    with pytest.raises(KeyError), fmd_ext.patch(thinker) as handle:
        handle.unpatch()
        raise KeyError  # is not hidden by an error about the patch


def test_a_handle_of_the_past_does_nothing(thinker):
    old = fmd_ext.patch(thinker, fork_layers=2)
    old.unpatch()
    with fmd_ext.patch(thinker, fork_layers=3) as now:
        for use in (old.unpatch, old.__enter__):
            with pytest.raises(ValueError, match="is not in force any more"):
                use()
        assert now.is_in_force


@pytest.mark.parametrize("part", ["full", "thinker"])
def test_the_full_model_is_patched_in_its_thinker(omni, part):
    patched, other = (omni, omni.thinker) if part == "full" else (omni.thinker, omni)
    handle = fmd_ext.patch(patched, fork_layers=1)
    assert handle.entry is omni.thinker and fmd_ext.handle_of(other) is handle
    assert fmd_ext.patch(other, fork_layers=1) is handle
    fmd_ext.unpatch(other)
    assert fmd_ext.handle_of(omni) is None and fmd_ext.handle_of(omni.thinker) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masking", ["zero", "attention"])
def test_low_precision_errs_no_more_than_plain_pytorch(dtype, masking):
    """Error against the fp32 reference at most twice that of the reference in the same dtype."""
    model = tiny_thinker(seed=0)
    inputs = build_inputs([VIDEO_AUDIO, TEXT_ONLY])
    config = FMDConfig(fork_layers=2, masking=masking).resolve(FMDConfig(), 4)
    keep = inputs["attention_mask"].bool()
    exact = reference_logits(model, config, **inputs)[keep]
    model.to(dtype)
    inputs = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    plain = (reference_logits(model, config, **inputs)[keep].float() - exact).abs()
    fmd_ext.patch(model, config)
    ours = (model(**inputs).logits[keep].float() - exact).abs()
    assert ours.mean() <= 2 * plain.mean() and ours.max() <= 2 * plain.max()


def test_importing_is_light_and_names_are_the_functions():
    """`fmd-ext doctor` can then say why an op library does not load; a submodule never hides a function."""
    code = (
        "import sys, fmd_ext; assert 'fmd_ext.ops' not in sys.modules; "
        "import fmd_ext.engine.forward, fmd_ext.patching; "
        "assert callable(fmd_ext.patch) and callable(fmd_ext.unpatch) and 'patch' in dir(fmd_ext)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

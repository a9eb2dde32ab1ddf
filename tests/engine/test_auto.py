"""alpha="auto" and fork_layers="auto": against whole attention matrices, and the reference with what was chosen."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import DynamicCache

import fmd_ext
from fmd_ext import FMDConfig
from fmd_ext.adapters import AUDIO, VISUAL
from fmd_ext.engine import auto
from fmd_ext.engine.reference import decoder_inputs, reference_generate, reference_logits
from fmd_ext.lab.tiny import TOKEN_IDS, tiny_thinker
from omni_inputs import AUDIO_VIDEO, INTERLEAVED, TEXT_ONLY, TWO_CLIPS, VIDEO_AUDIO, VIDEO_ONLY, build_inputs

NUM_LAYERS = 8
FADES = 0.93  # random weights read evenly: with the package's threshold all prompts would go to the bound
BATCHES = {
    "one": [VIDEO_AUDIO],
    "interleaved": [INTERLEAVED],
    "mixed": [TWO_CLIPS, TEXT_ONLY, AUDIO_VIDEO, VIDEO_ONLY],
}
WORDS_ONLY = {"suppress_tokens": list(TOKEN_IDS.values())}


@pytest.fixture(scope="module")
def _deep():
    return tiny_thinker(seed=2, num_layers=NUM_LAYERS, hidden_size=128)


@pytest.fixture
def model(_deep):
    yield _deep
    if fmd_ext.handle_of(_deep) is not None:
        fmd_ext.unpatch(_deep)


@pytest.fixture(autouse=True)
def _threshold(monkeypatch):
    monkeypatch.setattr(auto, "READING_FADES", FADES)


@pytest.fixture(scope="module")
def eager():
    model = tiny_thinker(seed=2, num_layers=NUM_LAYERS, hidden_size=128)
    model.set_attn_implementation("eager")
    return model


def shares(eager, given, sample, mask_scale=0.0):
    """[layers, branch, modality] of a sample's last token, from the attention matrices of two masked passes."""
    keep = given["labels"][sample] >= 0
    labels = given["labels"][sample, keep]
    decoder = eager.model.language_model if hasattr(eager.model, "language_model") else eager.model
    branches = []
    for masked in (AUDIO, VISUAL):
        embeds = given["inputs_embeds"][sample : sample + 1, keep].clone()
        embeds[:, labels == masked] *= mask_scale
        positions = given["position_ids"][..., sample : sample + 1, keep]
        out = decoder(inputs_embeds=embeds, position_ids=positions, output_attentions=True, use_cache=False)
        rows = torch.stack([weights[0, :, -1].mean(0) for weights in out.attentions])
        branches.append(torch.stack([rows[:, labels == label].sum(-1) for label in (VISUAL, AUDIO)], -1))
    return torch.stack(branches, 1)


def alpha_of(shares, fork_layers):
    total = shares[:fork_layers].sum(0)
    return [float(1 + total[m, m] / (total[m, m] + total[1 - m, m])) / 2 for m in (0, 1)]


def depth_of(shares):
    """The first layer that reads less than half of the most so far; at most half of the layers."""
    most = 0.0
    for layer in range(NUM_LAYERS // 2):
        reading = float(shares[layer, 0, 0] + shares[layer, 1, 1])
        most = max(most, reading)
        if reading < FADES * most:
            return layer + 1
    return NUM_LAYERS // 2


def forked_samples(given):
    return [i for i, labels in enumerate(given["labels"]) if {VISUAL, AUDIO} <= set(labels.tolist())]


def resolved(alpha, count, **settings):
    """One resolved config per sample; ``alpha`` {sample: (visual, audio)}."""
    default = FMDConfig(alpha=0.5, **settings).resolve(FMDConfig(), NUM_LAYERS)
    return [
        default if i not in alpha else default.replace(alpha=dict(zip(("visual", "audio"), alpha[i], strict=True)))
        for i in range(count)
    ]


@pytest.mark.parametrize("mask_scale", [0.0, 0.4])
@pytest.mark.parametrize("batch", BATCHES)
def test_alpha_of_each_sample(model, eager, batch, mask_scale):
    inputs = build_inputs(BATCHES[batch])
    given = decoder_inputs(eager, **inputs)
    expected = {i: alpha_of(shares(eager, given, i, mask_scale), 3) for i in forked_samples(given)}
    reference = reference_logits(
        model, resolved(expected, len(given["labels"]), fork_layers=3, mask_scale=mask_scale), **inputs
    )
    handle = fmd_ext.patch(model, fork_layers=3, alpha="auto", mask_scale=mask_scale)
    logits = model(**inputs).logits
    for sample, alpha in expected.items():
        assert handle.last_call.home_weights[sample, 1:3].tolist() == pytest.approx(alpha, abs=1e-5)
    keep = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[keep], reference[keep], atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("masking", ["zero", "attention"])
def test_depth_of_a_prompt(eager, model, seed, masking):
    """The layers that run before the choice are the same whatever is chosen, so two whole passes tell all depths."""
    inputs = build_inputs([VIDEO_AUDIO if seed % 2 else INTERLEAVED], seed=seed)
    given = decoder_inputs(eager, **inputs)
    handle = fmd_ext.patch(model, fork_layers="auto", masking=masking)
    logits = model(**inputs).logits
    chosen = handle.last_call.fork_layers
    if masking == "zero":
        assert chosen == depth_of(shares(eager, given, 0))
    fmd_ext.unpatch(model)
    config = FMDConfig(fork_layers=chosen, masking=masking).resolve(FMDConfig(), NUM_LAYERS)
    torch.testing.assert_close(logits, reference_logits(model, config, **inputs), atol=1e-4, rtol=0)


def test_prompts_choose_different_depths(eager):
    """Else the test above would not tell the rule from a constant."""
    inputs = [build_inputs([VIDEO_AUDIO if seed % 2 else INTERLEAVED], seed=seed) for seed in range(4)]
    depths = {depth_of(shares(eager, decoder_inputs(eager, **one), 0)) for one in inputs}
    assert len(depths) > 1


def test_two_layers_fork_in_the_first():
    """The shallowest merge there is: right behind layer 0."""
    shallow = tiny_thinker(seed=2, num_layers=2, hidden_size=128)
    inputs = build_inputs([VIDEO_AUDIO])
    expected = reference_logits(shallow, FMDConfig(fork_layers=1).resolve(FMDConfig(), 2), **inputs)
    handle = fmd_ext.patch(shallow, fork_layers="auto")
    torch.testing.assert_close(shallow(**inputs).logits, expected, atol=1e-4, rtol=0)
    assert handle.last_call.fork_layers == 1


@pytest.mark.parametrize("runner", [None, True], ids=["step by step", "runner"])
def test_the_deepest_sample_decides_for_a_batch(model, eager, runner):
    inputs = build_inputs([VIDEO_AUDIO, TEXT_ONLY, INTERLEAVED[:1] + AUDIO_VIDEO, TWO_CLIPS])
    given = decoder_inputs(eager, **inputs)
    all_shares = {i: shares(eager, given, i) for i in forked_samples(given)}
    depth = max(depth_of(own) for own in all_shares.values())
    alpha = {i: alpha_of(own, depth) for i, own in all_shares.items()}
    expected = reference_generate(model, resolved(alpha, 4, fork_layers=depth), 6, **inputs)
    handle = fmd_ext.patch(model, fork_layers="auto", alpha="auto", runner=runner)
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert handle.last_call.fork_layers == depth  # also of the decode steps
    assert tokens[:, inputs["input_ids"].shape[1] :].tolist() == expected.tolist()


def test_the_runner_keeps_steps_of_different_depths_apart(model):
    """Prompts of one shape that chose different depths are not run over each other's pools."""
    prompts = [build_inputs([INTERLEAVED if seed % 2 == 0 else VIDEO_AUDIO], seed=seed) for seed in range(4)]
    tokens, depths = [], []
    for runner in (False, True):
        handle = fmd_ext.patch(model, fork_layers="auto", alpha="auto", runner=runner)
        for inputs in prompts:
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
            tokens.append(out.tolist())
            depths.append(handle.last_call.fork_layers)
        handle.unpatch()
    assert tokens[:4] == tokens[4:] and depths[:4] == depths[4:] and len(set(depths)) > 1


def test_branches_that_mask_nothing_are_read_alike(model):
    handle = fmd_ext.patch(model, fork_layers=2, alpha="auto", mask_scale=1.0)
    model(**build_inputs([VIDEO_AUDIO]))
    assert handle.last_call.home_weights[0, 1:3].tolist() == pytest.approx([0.75, 0.75], abs=1e-6)


def test_alpha_has_no_effect_with_attention_masking(model):
    inputs = build_inputs([VIDEO_AUDIO, AUDIO_VIDEO])
    with fmd_ext.patch(model, fork_layers=2, masking="attention", alpha="auto") as handle:
        logits = model(**inputs).logits
        assert handle.last_call.home_weights is None and handle.last_call.observer is None
    with fmd_ext.patch(model, fork_layers=2, masking="attention", alpha=0.1):
        assert torch.equal(model(**inputs).logits, logits)


def test_what_was_chosen_stays_with_the_cache(model):
    """A later call on the cache, a clip in it included, keeps depth and alpha; beams take their sample's along."""
    inputs = build_inputs([VIDEO_AUDIO, AUDIO_VIDEO])
    handle = fmd_ext.patch(model, fork_layers="auto", alpha="auto")
    cache = model(**inputs).past_key_values
    first = handle.last_call
    model(input_ids=torch.full((2, 3), 50), past_key_values=cache)
    assert handle.last_call.fork_layers == first.fork_layers
    assert torch.equal(handle.last_call.home_weights, first.home_weights)
    cache.reorder_cache(torch.tensor([1, 1]))
    model(input_ids=torch.full((2, 1), 50), past_key_values=cache)
    assert torch.equal(handle.last_call.home_weights, first.home_weights[[1, 1]])
    embeds = torch.randn(2, 4, 128)
    labels = [[0] * cache.get_seq_length() + [1, 2, 0, 0]] * 2
    model.get_decoder()(inputs_embeds=embeds, past_key_values=cache, modality_labels=labels)
    assert handle.last_call.observer is None and handle.last_call.fork_layers == first.fork_layers


def test_a_sample_that_forks_later_chooses_for_itself(model, eager):
    """In a call that ends within its sound, so that the last row is the audio branch's own; the other sample keeps
    what it has chosen before."""
    fork_layers, length = 3, 24
    embeds = torch.randn(2, length, 128, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(2, length, dtype=torch.long)
    labels[0, 2:5], labels[0, 5:9] = VISUAL, AUDIO
    labels[1, 14:18], labels[1, 18:] = VISUAL, AUDIO
    positions = torch.arange(length).expand(3, 2, length)
    handle = fmd_ext.patch(model, fork_layers=fork_layers, alpha="auto")
    first = slice(None, 12)
    call = {"inputs_embeds": embeds[:, first], "position_ids": positions[..., first]}
    cache = model.get_decoder()(**call, modality_labels=labels[:, first]).past_key_values
    before = handle.last_call.home_weights[0].tolist()
    rest = {"inputs_embeds": embeds[:, 12:], "position_ids": positions[..., 12:], "past_key_values": cache}
    model.get_decoder()(**rest, modality_labels=labels)
    weights = handle.last_call.home_weights
    assert weights[0].tolist() == before
    given = {"inputs_embeds": embeds, "position_ids": positions, "labels": labels}
    expected = alpha_of(shares(eager, given, 1), fork_layers)
    assert weights[1, 1:3].tolist() == pytest.approx(expected, abs=1e-5) and abs(expected[0] - expected[1]) > 1e-3


def test_a_layer_is_read_by_one_call_over_the_rows_that_are_read(model, monkeypatch):
    """What is read grows with neither the rows of the prompt nor the number of ops; an empty cache is a prefill."""
    calls, decode = [], auto.ops.branched_decode
    monkeypatch.setattr(auto.ops, "branched_decode", lambda q, *args: calls.append(len(q)) or decode(q, *args))
    handle = fmd_ext.patch(model, fork_layers=3, alpha="auto")
    model(**build_inputs([VIDEO_AUDIO, TEXT_ONLY, AUDIO_VIDEO]))
    assert calls == [4] * 3  # both branches of two samples, in three layers
    assert handle.last_call.observer._indicators == {}  # what is as long as the pools is not kept


def test_nothing_read_is_as_if_both_versions_were_read_alike():
    assert auto.alphas_of(torch.zeros(3, 1, 2, 2)).tolist() == [[0.75, 0.75]]


def test_where_nothing_forks_first_the_default_depth_holds(model):
    inputs = build_inputs([[("text", 12), *VIDEO_AUDIO]])
    handle = fmd_ext.patch(model, fork_layers="auto", alpha="auto")
    words = {"input_ids": inputs["input_ids"][:, :12], "attention_mask": torch.ones(1, 12)}
    cache = model(**words, past_key_values=DynamicCache()).past_key_values
    assert handle.last_call.fork_layers == NUM_LAYERS // 4
    given = decoder_inputs_of(model, inputs, cache)
    model.get_decoder()(
        inputs_embeds=given["inputs_embeds"][:, 12:],
        past_key_values=cache,
        modality_labels=given["labels"],
        position_ids=given["position_ids"][..., 12:],
    )
    assert handle.last_call.fork_layers == NUM_LAYERS // 4 and handle.last_call.observer is not None


def decoder_inputs_of(model, inputs, cache):
    """`decoder_inputs` on a patched model."""
    handle = fmd_ext.handle_of(model)
    config = handle.config
    fmd_ext.unpatch(model)
    given = decoder_inputs(model, **inputs)
    fmd_ext.patch(model, config)
    cache.layers[0].state.session = fmd_ext.handle_of(model).session  # goes on with the same cache
    handle.__dict__.update(fmd_ext.handle_of(model).__dict__)
    return given


def test_low_precision(model):
    """Chosen in bfloat16, alpha is that of float32 but for rounding."""
    inputs = build_inputs([VIDEO_AUDIO])
    with fmd_ext.patch(model, fork_layers=2, alpha="auto") as handle:
        model(**inputs)
        exact = handle.last_call.home_weights
    low = tiny_thinker(seed=2, num_layers=NUM_LAYERS, hidden_size=128).to(torch.bfloat16)
    inputs = {k: v.to(torch.bfloat16) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    with fmd_ext.patch(low, fork_layers=2, alpha="auto") as handle:
        low(**inputs)
        torch.testing.assert_close(handle.last_call.home_weights, exact, atol=0.02, rtol=0)


def test_the_config_says_auto(model):
    handle = fmd_ext.patch(model, fork_layers="auto", alpha="auto")
    assert (handle.config.fork_layers, handle.config.alpha) == ("auto", "auto")
    assert dataclasses.asdict(handle.config)["alpha"] == "auto"

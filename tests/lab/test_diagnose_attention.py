"""Shares of attention against the full attention matrices of the eager model."""

from __future__ import annotations

import pytest
import torch

import fmd_ext
from fmd_ext.engine.reference import decoder_inputs
from fmd_ext.lab.diagnose import attention_share
from fmd_ext.lab.tiny import tiny_thinker
from omni_inputs import build_inputs

SAMPLE = [("text", 7), ("video", (2, 4, 4)), ("text", 2), ("audio", 60), ("text", 9)]
TOLERANCE = 1e-5
MODALITIES = {"text": 0, "visual": 1, "audio": 2}


@pytest.fixture(scope="module")
def eager():
    """The weights of the `thinker` fixture, with an attention that returns its weights."""
    model = tiny_thinker(seed=0)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture
def inputs():
    return build_inputs([SAMPLE])


def expected(eager, inputs_embeds, position_ids, labels, position, hidden=None):
    """Shares per layer {modality: share} of the row ``position``, by the decoder's own attention weights."""
    decoder = eager.model.language_model if hasattr(eager.model, "language_model") else eager.model
    out = decoder(inputs_embeds=inputs_embeds, position_ids=position_ids, output_attentions=True, use_cache=False)
    rows = [weights[0, :, position].mean(0) for weights in out.attentions]
    return [{name: float(row[labels[0] == value].sum()) for name, value in MODALITIES.items()} for row in rows]


def assert_close(layer, shares):
    for name in MODALITIES:
        assert abs(getattr(layer, name) - shares[name]) < TOLERANCE, (layer, shares)


def mask_out(given, modality):
    """The embeddings with those of a modality set to zero."""
    return given["inputs_embeds"].masked_fill((given["labels"] == MODALITIES[modality])[..., None], 0.0)


@pytest.mark.parametrize("position", [-1, -4, 10, 0])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_vanilla(eager, inputs, position, implementation):
    given = decoder_inputs(eager, **inputs)
    model = tiny_thinker(seed=0)
    model.set_attn_implementation(implementation)
    share = attention_share(model, inputs, position)
    shares = expected(eager, **given, position=position)
    assert [layer.layer for layer in share.layers] == [0, 1, 2, 3] and share.branches == ("all",)
    for layer, wanted in zip(share.layers, shares, strict=True):
        assert_close(layer, wanted)
    for name, value in share.mean().items():
        assert abs(value - sum(wanted[name] for wanted in shares) / 4) < TOLERANCE


def test_branches_with_zero_masking(thinker, eager, inputs):
    given = decoder_inputs(eager, **inputs)
    position = -2
    branches = {
        branch: expected(eager, mask_out(given, masked), given["position_ids"], given["labels"], position)
        for branch, masked in (("visual", "audio"), ("audio", "visual"))
    }
    fmd_ext.patch(thinker, fork_layers=3)
    share = attention_share(thinker, inputs, position)
    assert [(layer.layer, layer.branch) for layer in share.layers] == [
        *((index, branch) for index in range(3) for branch in ("visual", "audio")),
        (3, "all"),
    ]
    for layer in share.layers[:-1]:
        assert_close(layer, branches[layer.branch][layer.layer])


@pytest.mark.parametrize("masking", ["zero", "attention"])
def test_shares_sum_to_one_and_a_branch_without_a_modality_gives_it_none(thinker, inputs, masking):
    fmd_ext.patch(thinker, fork_layers=2, masking=masking)
    share = attention_share(thinker, inputs)
    for layer in share.layers:
        assert abs(layer.visual + layer.audio + layer.text - 1) < TOLERANCE
        if layer.branch == "all" or masking == "zero":
            assert min(layer.visual, layer.audio, layer.text) > 0
        else:
            assert (layer.visual == 0, layer.audio == 0) == (layer.branch == "audio", layer.branch == "visual")
    assert abs(sum(share.mean().values()) - 1) < TOLERANCE
    overall = share.mean()["text"]
    per_branch = [share.mean(branch)["text"] for branch in ("visual", "audio", "all")]
    # Two forked layers of two rows each, and two merged ones.
    assert abs(overall - (per_branch[0] + per_branch[1] + 2 * per_branch[2]) / 4) < TOLERANCE


def test_branches_that_mask_nothing_are_the_vanilla_model(thinker, eager, inputs):
    """With a mask scale of 1 both branches, and what they merge to, are the model's own states."""
    given = decoder_inputs(eager, **inputs)
    shares = expected(eager, **given, position=-1)
    fmd_ext.patch(thinker, fork_layers=2, mask_scale=1.0)
    for layer in attention_share(thinker, inputs).layers:
        assert_close(layer, shares[layer.layer])


@pytest.mark.parametrize("position, home", [(9, "visual"), (20, "audio")])
def test_rows_of_branch_modalities_are_in_the_right_branch(thinker, inputs, position, home):
    """A masked position is absent from the other branch, so its own row is the only one."""
    labels = decoder_inputs(thinker, **inputs)["labels"][0]
    assert labels[position] == MODALITIES[home]
    fmd_ext.patch(thinker, fork_layers=1, masking="zero")
    both = attention_share(thinker, inputs, position).layers[:2]
    assert {layer.branch for layer in both} == {"visual", "audio"}
    fmd_ext.unpatch(thinker)
    fmd_ext.patch(thinker, fork_layers=1, masking="attention")
    first = attention_share(thinker, inputs, position).layers[0]
    assert first.branch == home and (first.audio if home == "visual" else first.visual) == 0


@pytest.mark.parametrize("masking", ["zero", "attention"])
def test_a_position_of_the_prefix_is_of_all_branches(thinker, eager, inputs, masking):
    """It has one row, in forked layers too, and sees what it sees in the model as it is."""
    shares = expected(eager, **decoder_inputs(eager, **inputs), position=2)
    fmd_ext.patch(thinker, fork_layers=2, masking=masking)
    share = attention_share(thinker, inputs, 2)
    assert share.branches == ("all",) and len(share.layers) == 4
    for layer, wanted in zip(share.layers, shares, strict=True):
        assert_close(layer, wanted)


def test_a_sample_that_does_not_fork(thinker, eager):
    inputs = build_inputs([[("text", 5), ("video", (2, 4, 4)), ("text", 4)]])
    given = decoder_inputs(eager, **inputs)
    fmd_ext.patch(thinker, fork_layers=2)
    share = attention_share(thinker, inputs)
    assert share.branches == ("all",)
    for layer, wanted in zip(share.layers, expected(eager, **given, position=-1), strict=True):
        assert_close(layer, wanted)


def test_left_padding_changes_nothing(thinker, inputs):
    pad = 5
    padded = dict(inputs)
    padded["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (pad, 0))
    padded["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (pad, 0))
    for settings in (None, {"fork_layers": 2}):
        if settings:
            fmd_ext.patch(thinker, **settings)
        plain, shifted = attention_share(thinker, inputs), attention_share(thinker, padded)
        for one, other in zip(plain.layers, shifted.layers, strict=True):
            assert_close(other, {name: getattr(one, name) for name in MODALITIES})
    with pytest.raises(ValueError, match="is no token of the sample"):
        attention_share(thinker, padded, 2)


def test_the_model_is_left_as_it_was(thinker, inputs):
    modules = list(thinker.modules())
    before = [dict(module.__dict__) for module in modules]
    attention_share(thinker, inputs)
    with pytest.raises(ValueError):
        attention_share(thinker, inputs, 10_000)
    rope_deltas = {"rope_deltas"}  # transformers' own memory of the last prompt
    for module, state in zip(modules, before, strict=True):
        assert module.__dict__.keys() - rope_deltas == state.keys() - rope_deltas
        assert module.__dict__.get("config") is state.get("config")


def test_what_is_refused(thinker):
    two = build_inputs([SAMPLE, SAMPLE])
    with pytest.raises(ValueError, match="one sample at a time, got 2"):
        attention_share(thinker, two)
    with pytest.raises(ValueError, match="neither input_ids nor modality_labels"):
        attention_share(thinker, {"inputs_embeds": torch.zeros(1, 3, 256)})
    one = attention_share(thinker, build_inputs([SAMPLE]))
    with pytest.raises(ValueError, match="no layer has the branch 'audio'"):
        one.mean("audio")

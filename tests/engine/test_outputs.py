"""Outputs of the layers besides hidden states come back by sample and position, or are refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.modeling_outputs import MoeModelOutputWithPast

import fmd_ext
from fmd_ext.engine.outputs import unpack_outputs
from fmd_ext.lab.tiny.qwen3_omni import tiny_qwen3_thinker
from omni_inputs import QWEN3, TEXT_ONLY, VIDEO_AUDIO, build_inputs

DIMS = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
LABELS = torch.tensor([[0, 0, 1, 1, 1, 0, 2, 2, 2, 0, 0, 0]] * 2)


@pytest.fixture(scope="module")
def mixture():
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**DIMS, **HEADS, **EXPERTS)).eval()


@pytest.fixture
def calls():
    ids = torch.arange(20, 44).view(2, 12)
    padded = torch.ones_like(ids)
    padded[0, :2] = 0
    return ids, {"no mask": {}, "padding": {"attention_mask": padded}, "ones": {"attention_mask": torch.ones_like(ids)}}


@pytest.mark.parametrize("mask", ["no mask", "padding", "ones"])
def test_router_logits_of_a_text_only_call_are_those_of_the_unpatched_model(mixture, calls, mask):
    ids, masks = calls
    call = {"input_ids": ids, **masks[mask], "output_router_logits": True}
    expected = mixture(**call)
    with fmd_ext.patch(mixture, adapter="text", fork_layers=1):
        actual = mixture(**call)
    keep = masks[mask].get("attention_mask", torch.ones_like(ids)).bool().flatten()
    for a, e in zip(actual.router_logits, expected.router_logits, strict=True):
        assert a.shape == e.shape
        torch.testing.assert_close(a[keep], e[keep], atol=1e-5, rtol=0)
    torch.testing.assert_close(actual.aux_loss, expected.aux_loss, atol=1e-5, rtol=0)


def test_router_logits_of_forked_positions_are_those_of_their_own_branch(mixture, calls):
    """Of layer 0, whose input is the embeddings: where a position is visible to itself alone, the router's own."""
    ids, masks = calls
    seen = []
    router = mixture.model.layers[0].mlp.gate
    hook = router.register_forward_hook(lambda module, args, out: seen.append(out[0].clone()))
    with fmd_ext.patch(mixture, adapter="text", fork_layers=1) as handle:
        out = mixture(input_ids=ids, modality_labels=LABELS, output_router_logits=True)
        plan = handle.last_call.plan
    hook.remove()
    assert plan.num_away > 0 and len(seen[0]) == plan.num_rows
    assert [list(r.shape) for r in out.router_logits] == [[24, 8], [24, 8]]
    assert torch.equal(out.router_logits[0], seen[0][: plan.num_home])
    rows = [mixture(input_ids=ids[:1, :2], output_router_logits=True).router_logits[0]]
    torch.testing.assert_close(out.router_logits[0][:2], rows[0], atol=1e-5, rtol=0)  # the prefix


def test_router_logits_of_the_thinker():
    model = tiny_qwen3_thinker(seed=0)
    inputs = build_inputs([VIDEO_AUDIO, TEXT_ONLY], family=QWEN3)
    expected = model(**inputs, output_router_logits=True)
    if expected.router_logits is None:
        pytest.skip("the thinker of this transformers does not hand its router logits on, patched or not")
    fmd_ext.patch(model, fork_layers=1)
    actual = model(**inputs, output_router_logits=True)
    assert [r.shape for r in actual.router_logits] == [r.shape for r in expected.router_logits]
    assert torch.isfinite(actual.aux_loss) and (actual.aux_loss - expected.aux_loss).abs() < 0.5


def test_an_output_that_is_not_by_row_is_refused(mixture, calls):
    with fmd_ext.patch(mixture, adapter="text", fork_layers=1) as handle:
        mixture(input_ids=calls[0], modality_labels=LABELS)
        plan = handle.last_call.plan
    out = MoeModelOutputWithPast(last_hidden_state=torch.zeros(1, plan.num_rows, 4), router_logits=(torch.zeros(3, 8),))
    with pytest.raises(TypeError, match=r"the decoder returns router_logits \(\[3, 8\]\), which is not given by row"):
        unpack_outputs(out, plan, None)

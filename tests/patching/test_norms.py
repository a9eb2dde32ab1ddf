"""RMS norms of a patched decoder run as one function of torch; other norms, and what others replaced, as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeThinkerTextRMSNorm

import fmd_ext
from fmd_ext.patching.fusions import norms
from omni_inputs import VIDEO_AUDIO, build_inputs


class ShiftedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden):
        return super().forward(hidden) + 0.01


class SlowRMSNorm(LlamaRMSNorm):
    def __init__(self, size):
        super().__init__(size)
        self.scale = nn.Linear(1, 1)


@pytest.mark.parametrize(
    "module,plain",
    [
        (LlamaRMSNorm(16, eps=1e-3), True),
        (Qwen3OmniMoeThinkerTextRMSNorm(16), True),
        (GemmaRMSNorm(16), False),
        (ShiftedRMSNorm(16), False),
        (SlowRMSNorm(16), False),
        (nn.LayerNorm(16), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_only_a_norm_that_computes_the_same_is_plain(module, plain):
    assert norms.is_plain(module) is plain


def test_a_replaced_forward_is_not_plain():
    module = LlamaRMSNorm(16)
    module.forward = lambda hidden: hidden
    assert not norms.is_plain(module)


def test_patched_norms_give_the_same_bits_and_go_again(thinker, monkeypatch):
    decoder = fmd_ext.adapters.find_adapter(thinker).find_decoder(thinker)
    inputs, seen = build_inputs([VIDEO_AUDIO]), []
    original = torch.rms_norm
    monkeypatch.setattr(torch, "rms_norm", lambda *args: seen.append(1) or original(*args))
    with fmd_ext.patch(thinker, fork_layers=2):
        seen.clear()  # of the trial
        fused = thinker(**inputs).logits
    assert len(seen) == 2 * 4 + 1
    assert not any("forward" in module.__dict__ for module in (decoder.norm, decoder.layers[0].input_layernorm))
    monkeypatch.setattr(norms, "is_plain", lambda module: False)
    with fmd_ext.patch(thinker, fork_layers=2):
        assert torch.equal(thinker(**inputs).logits, fused)
    assert len(seen) == 9


def test_the_argument_may_have_a_name(thinker):
    norm = fmd_ext.adapters.find_adapter(thinker).find_decoder(thinker).norm
    hidden = torch.randn(1, 3, norm.weight.shape[0])
    with fmd_ext.patch(thinker, fork_layers=2):
        assert torch.equal(norm(hidden_states=hidden), norm(hidden))


def test_a_weight_of_another_dtype_is_left_to_the_model(thinker):
    """As where norms are kept in float32: the model's own code decides on the dtype that comes out."""
    norm = fmd_ext.adapters.find_adapter(thinker).find_decoder(thinker).norm
    hidden = torch.randn(1, 3, norm.weight.shape[0], dtype=torch.bfloat16)
    expected = norm(hidden)
    with fmd_ext.patch(thinker, fork_layers=2):
        assert norm(hidden).dtype == expected.dtype == torch.float32
        assert torch.equal(norm(hidden), expected)

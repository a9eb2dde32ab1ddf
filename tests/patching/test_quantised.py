"""Weights quantised by the libraries that published checkpoints are made with: the layers run as they are.

Each is tested where its library is installed and runs on a CPU. bitsandbytes: test_integrations.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fmd_ext
from fmd_ext import FMDConfig
from fmd_ext.engine.reference import reference_generate, reference_logits
from fmd_ext.lab.tiny import tiny_thinker
from omni_inputs import AUDIO_VIDEO, VIDEO_AUDIO, build_inputs

CONFIGS = [
    FMDConfig(fork_layers=2, masking=masking, alpha=0.7).resolve(FMDConfig(), 4) for masking in ("zero", "attention")
]


def torchao_weights(kind):
    quantization = pytest.importorskip("torchao.quantization")

    def quantise(decoder):
        quantization.quantize_(decoder.layers, getattr(quantization, kind)())

    return quantise


def quanto_weights(kind):
    quanto = pytest.importorskip("optimum.quanto")

    def quantise(decoder):
        quanto.quantize(decoder, weights=getattr(quanto, kind))
        quanto.freeze(decoder)

    return quantise


def hqq_weights(bits):
    core = pytest.importorskip("hqq.core.quantize")

    def quantise(decoder):
        settings = core.BaseQuantizeConfig(nbits=bits, group_size=64)
        for layer in decoder.layers:
            for parent in (layer.self_attn, layer.mlp):
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.Linear):
                        linear = core.HQQLinear(child, settings, compute_dtype=torch.float32, device="cpu")
                        setattr(parent, name, linear)

    return quantise


WAYS = {
    "torchao int8": (torchao_weights, "Int8WeightOnlyConfig"),
    "torchao float8": (torchao_weights, "Float8WeightOnlyConfig"),
    "quanto int8": (quanto_weights, "qint8"),
    "quanto int4": (quanto_weights, "qint4"),
    "quanto float8": (quanto_weights, "qfloat8"),
    "hqq 4 bits": (hqq_weights, 4),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.masking)
def test_weight_only(way, config):
    make, kind = WAYS[way]
    quantise = make(kind)
    model, inputs = tiny_thinker(seed=0), build_inputs([VIDEO_AUDIO, AUDIO_VIDEO])
    keep = inputs["attention_mask"].bool()
    full = model(**inputs).logits
    quantise(model.get_decoder())
    vanilla = model(**inputs).logits
    assert (vanilla - full)[keep].abs().max() > 1e-3  # it is quantised
    expected, tokens = reference_logits(model, config, **inputs), reference_generate(model, config, 4, **inputs)
    with fmd_ext.patch(model, config) as handle:
        torch.testing.assert_close(model(**inputs).logits[keep], expected[keep], atol=1e-4, rtol=0)
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert out[:, -4:].tolist() == tokens.tolist() and handle.last_call.plan.forked.all()
    assert torch.equal(model(**inputs).logits, vanilla)

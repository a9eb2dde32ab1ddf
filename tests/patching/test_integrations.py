"""What other libraries put around or into a model's layers: the layers run as they are, so it keeps working."""

from __future__ import annotations

import pytest
import torch

import fmd_ext
from fmd_ext import FMDConfig
from fmd_ext.engine.reference import reference_generate, reference_logits
from fmd_ext.lab.tiny import tiny_thinker
from omni_inputs import AUDIO_VIDEO, VIDEO_AUDIO, build_inputs

CONFIGS = [
    FMDConfig(fork_layers=2, masking=masking, alpha=0.7).resolve(FMDConfig(), 4) for masking in ("zero", "attention")
]
EVERY_MASKING = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.masking)


def check(model, config):
    """Logits and greedy tokens of ``model`` equal two plain passes of the same model; unpatching restores it."""
    inputs = build_inputs([VIDEO_AUDIO, AUDIO_VIDEO])
    keep = inputs["attention_mask"].bool()
    vanilla = model(**inputs).logits
    expected, tokens = reference_logits(model, config, **inputs), reference_generate(model, config, 4, **inputs)
    with fmd_ext.patch(model, config) as handle:
        torch.testing.assert_close(model(**inputs).logits[keep], expected[keep], atol=1e-4, rtol=0)
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert out[:, -4:].tolist() == tokens.tolist()
        assert handle.last_call.plan.forked.all()
    assert torch.equal(model(**inputs).logits, vanilla)


@pytest.fixture
def lora():
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj", "down_proj"]
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(tiny_thinker(seed=0), settings).eval()


@EVERY_MASKING
def test_a_lora_adapter(lora, config):
    check(lora, config)


def test_lora_adapters_are_switched_under_the_patch(lora):
    inputs = build_inputs([VIDEO_AUDIO])
    with_lora = reference_logits(lora, CONFIGS[0], **inputs)
    with lora.disable_adapter():
        without = reference_logits(lora, CONFIGS[0], **inputs)
    assert (with_lora - without).abs().max() > 0.1
    handle = fmd_ext.patch(lora, CONFIGS[0])
    assert fmd_ext.handle_of(lora) is handle and fmd_ext.handle_of(lora.get_base_model()) is handle
    torch.testing.assert_close(lora(**inputs).logits, with_lora, atol=1e-4, rtol=0)
    with lora.disable_adapter():
        torch.testing.assert_close(lora(**inputs).logits, without, atol=1e-4, rtol=0)
    fmd_ext.unpatch(lora)
    assert fmd_ext.handle_of(lora) is None


@EVERY_MASKING
def test_four_bit_weights(config):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_thinker(seed=0)
    for layer in model.get_decoder().layers:
        for parent, name in ((layer.self_attn, "q_proj"), (layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
            full = getattr(parent, name)
            four_bit = bitsandbytes.nn.Linear4bit(
                full.in_features, full.out_features, bias=full.bias is not None, quant_type="nf4",
                compute_dtype=torch.float32,
            )  # fmt: skip
            four_bit.load_state_dict(full.state_dict())
            setattr(parent, name, four_bit.to("cpu"))
    check(model, config)


@EVERY_MASKING
def test_layers_that_accelerate_places(tmp_path, config):
    """As a ``device_map`` does it: hooks move each layer's inputs, and fetch the weights of every second layer."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny_thinker(seed=0)
    layers = model.get_decoder().layers
    leaves = [name for name, module in model.named_modules() if not list(module.children())]
    path = next(name for name, module in model.named_modules() if module is layers)  # transformers moved it
    places = {name: "cpu" for name in leaves if not name.startswith(path)}
    places |= {f"{path}.{i}": ("cpu", "disk")[i % 2] for i in range(4)}
    model = accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True, skip_keys="past_key_values"
    )
    assert {next(layer.parameters()).device.type for layer in layers[1::2]} == {"meta"}
    check(model, config)

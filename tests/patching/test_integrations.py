"""What other libraries put around or into a model's layers: the layers run as they are, so it keeps working."""

from __future__ import annotations

import pytest
import torch

import fmd_ext
from fmd_ext import FMDConfig
from fmd_ext.engine.reference import reference_generate, reference_logits
from fmd_ext.lab.tiny import save_random_model, tiny_thinker
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


def places_of(model, layers):
    """A device map with a place for each of the decoder's ``layers``, the CPU for everything else."""
    path = next(name for name, module in model.named_modules() if module is model.get_decoder().layers)
    leaves = [name for name, module in model.named_modules() if not list(module.children())]
    elsewhere = {name: "cpu" for name in leaves if not name.startswith(path)}
    return elsewhere | {f"{path}.{index}": place for index, place in enumerate(layers)}


@EVERY_MASKING
def test_layers_that_accelerate_places(tmp_path, config):
    """As a ``device_map`` does it: hooks move each layer's inputs, and fetch the weights of every second layer."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny_thinker(seed=0)
    layers = model.get_decoder().layers
    places = places_of(model, ("cpu", "disk", "cpu", "disk"))
    model = accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True, skip_keys="past_key_values"
    )
    assert {next(layer.parameters()).device.type for layer in layers[1::2]} == {"meta"}
    check(model, config)


def test_a_device_map_given_to_from_pretrained(tmp_path):
    """Its logits and tokens are those of the same folder loaded whole: which layer lies where changes nothing."""
    pytest.importorskip("accelerate")
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

    folder, inputs = save_random_model(tmp_path / "model"), build_inputs([VIDEO_AUDIO, AUDIO_VIDEO])
    whole = Thinker.from_pretrained(folder)
    spread = Thinker.from_pretrained(
        folder,
        device_map=places_of(whole, ("cpu", "disk", "disk", "cpu")),  # the last forked layer, the first merged one
        offload_folder=str(tmp_path / "offloaded"),
    )
    places = [next(layer.parameters()).device.type for layer in spread.get_decoder().layers]
    assert places == ["cpu", "meta", "meta", "cpu"]
    found = []
    for model in (whole, spread):
        with fmd_ext.patch(model, CONFIGS[0]):
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
            found.append((model(**inputs).logits, out))
    keep = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[1][0][keep], found[0][0][keep], atol=1e-5, rtol=0)
    assert torch.equal(found[1][1], found[0][1])
    assert (found[0][0] - whole(**inputs).logits)[keep].abs().max() > 0.1, "nothing was forked"

"""Any Llama- or Qwen-like decoder: the caller hands over embeddings and labels."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma4TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import fmd_ext
from fmd_ext import FMDConfig
from fmd_ext.engine.reference import reference_hidden

DIMS = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}
FAMILIES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3 (q/k norms)": Qwen3Config}


@pytest.fixture(params=FAMILIES)
def model(request):
    config = FAMILIES[request.param](**DIMS)
    if hasattr(config, "sliding_window"):
        config.sliding_window = None
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


LABELS = torch.tensor([[-1, -1, 0, 0, 1, 1, 1, 2, 2, 0, 0, 0], [0, 1, 1, 2, 1, 2, 2, 0, 2, 1, 0, 0]])
MASK = (LABELS >= 0).long()


@pytest.mark.parametrize("masking", ["zero", "attention"])
@pytest.mark.parametrize("fork_layers", [1, 3])
def test_logits_equal_the_reference(model, masking, fork_layers):
    config = FMDConfig(fork_layers=fork_layers, masking=masking, alpha=0.7).resolve(FMDConfig(), 3)
    embeds = torch.randn(2, 12, 96)
    positions = (MASK.cumsum(-1) - 1).clamp(min=0)
    expected = model.lm_head(reference_hidden(model.model, config, embeds, LABELS, positions))
    fmd_ext.patch(model, config, adapter="text")
    actual = model(inputs_embeds=embeds, attention_mask=MASK, position_ids=positions, modality_labels=LABELS).logits
    torch.testing.assert_close(actual[MASK.bool()], expected[MASK.bool()], atol=1e-4, rtol=0)


@pytest.mark.parametrize("runner", [False, True])
def test_autocast(model, runner):
    """Linears in bfloat16, rotations in float32: an error at most twice that of two plain passes under autocast."""
    config = FMDConfig(fork_layers=2).resolve(FMDConfig(), 3)
    embeds, ids = torch.randn(2, 12, 96), torch.randint(0, 97, (2, 4))
    exact = model.lm_head(reference_hidden(model.model, config, embeds, LABELS))[MASK.bool()]
    given = {"inputs_embeds": embeds, "attention_mask": MASK, "modality_labels": LABELS}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model.lm_head(reference_hidden(model.model, config, embeds, LABELS))[MASK.bool()].float()
        fmd_ext.patch(model, config, adapter="text", runner=runner)
        out = model(**given, position_ids=torch.arange(12)[None])
        tokens = model.generate(**given, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        model(input_ids=ids, past_key_values=out.past_key_values)
    ours = (out.logits[MASK.bool()].float() - exact).abs()
    assert ours.mean() <= 2 * (plain - exact).abs().mean() and ours.max() <= 2 * (plain - exact).abs().max()
    assert tokens.shape == (2, 4) and out.past_key_values.layers[0].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("masking", ["zero", "attention"])
def test_generate_takes_labels(model, masking):
    """As an argument or from the handle's context; tokens equal one full recompute per step."""
    embeds = torch.randn(2, 12, 96)
    handle = fmd_ext.patch(model, adapter="text", fork_layers=2, masking=masking)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": MASK}
    tokens = model.generate(inputs_embeds=embeds, modality_labels=LABELS, **options)
    with handle.labels(LABELS):
        assert torch.equal(model.generate(inputs_embeds=embeds, **options), tokens)
    mask = MASK
    for step in range(5):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        call = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
        labels = torch.nn.functional.pad(LABELS, (0, step))  # words are text
        logits = model(**call, modality_labels=labels).logits[:, -1]
        assert logits.argmax(-1).tolist() == tokens[:, step].tolist()
        embeds = torch.cat([embeds, model.get_input_embeddings()(tokens[:, step : step + 1])], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)


def test_the_bare_decoder_can_be_patched_too(model):
    embeds = torch.randn(2, 12, 96)
    config = FMDConfig(fork_layers=2).resolve(FMDConfig(), 3)
    expected = reference_hidden(model.model, config, embeds, LABELS.clamp(min=0))
    fmd_ext.patch(model.model, config, adapter="text")
    actual = model.model(inputs_embeds=embeds, modality_labels=LABELS.clamp(min=0)).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_without_labels_it_is_vanilla(model):
    ids = torch.arange(10)[None]
    vanilla = model(ids).logits
    fmd_ext.patch(model, adapter="text")
    torch.testing.assert_close(model(ids).logits, vanilla, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "setting, what",
    [
        ({"hidden_size_per_layer_input": 16}, "feeds every layer an input of its own"),
        ({"num_kv_shared_layers": 1}, "reuse the keys of earlier ones"),
        ({"use_bidirectional_attention": "vision"}, "attend to later ones"),
        ({"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}, "layers of type sliding"),
    ],
    ids=str,
)
def test_what_gemma_4_does_is_refused(setting, what):
    plain = {"layer_types": ["full_attention"] * 3, "hidden_size_per_layer_input": 0, "global_head_dim": 16}
    config = Gemma4TextConfig(**{**DIMS, "vocab_size_per_layer_input": 97, **plain, **setting})
    with pytest.raises(TypeError, match=what):
        fmd_ext.patch(AutoModelForCausalLM.from_config(config), adapter="text")


def test_a_sliding_window_is_refused():
    config = MistralConfig(**DIMS, sliding_window=4)
    with pytest.raises(TypeError, match="sliding"):
        fmd_ext.patch(AutoModelForCausalLM.from_config(config), adapter="text")


@pytest.mark.parametrize("setting", [{"sliding_window": 4}, {"attn_logit_softcapping": 30.0}], ids=str)
def test_a_setting_that_no_layer_reads_is_no_reason_to_refuse(setting):
    """Llama's layers see the whole context, whatever else its config holds."""
    config = LlamaConfig(**DIMS)
    for name, value in setting.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(12)[None]
    vanilla = model(ids).logits
    fmd_ext.patch(model, adapter="text")
    torch.testing.assert_close(model(ids).logits, vanilla, atol=1e-4, rtol=0)

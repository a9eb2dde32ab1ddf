"""What PEFT puts around a model: virtual tokens before the ids, adapters by sample, copies of modules."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fmd_ext
from fmd_ext import FMDConfig
from fmd_ext.engine.reference import decoder_inputs, reference_generate, reference_hidden, reference_logits
from fmd_ext.lab.tiny import tiny_thinker
from fmd_ext.patching.branched_config import BranchedConfig
from fmd_ext.patching.fusions import row_chunks
from omni_inputs import AUDIO_VIDEO, VIDEO_AUDIO, build_inputs

peft = pytest.importorskip("peft")

CONFIG = FMDConfig(fork_layers=2, masking="zero", alpha=0.7).resolve(FMDConfig(), 4)
LINEARS = r"(.*language_model|model)\.layers\.\d+\.(self_attn|mlp)\.(q_proj|v_proj|down_proj)"
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
VIRTUAL = 3


def wrapped(settings, model=None):
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_thinker(seed=0) if model is None else model, settings).eval()


def lora(**settings):
    return peft.LoraConfig(r=4, init_lora_weights=False, **{"target_modules": LINEARS, **settings})


def labels_of(model, inputs):
    return decoder_inputs(model.get_base_model(), **inputs)["labels"]


@pytest.fixture(params=["PromptTuningConfig", "PromptEncoderConfig"])
def prompt_tuned(request):
    model = wrapped(getattr(peft, request.param)(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL))
    if getattr(model, "word_embeddings", None) is None:  # transformers 5.17
        pytest.skip("PEFT finds no word embeddings in the thinker of this transformers, patched or not")
    return model


def expected_behind_virtual_tokens(model, inputs):
    """Logits of two plain passes over what the unpatched model hands to its decoder, virtual tokens first."""
    base, caught = model.get_base_model(), {}
    labels = torch.nn.functional.pad(labels_of(model, inputs), (VIRTUAL, 0))
    hook = base.get_decoder().register_forward_pre_hook(lambda m, a, k: caught.update(k), with_kwargs=True)
    model(**inputs)
    hook.remove()
    hidden = reference_hidden(base.get_decoder(), CONFIG, caught["inputs_embeds"], labels, caught.get("position_ids"))
    return base.lm_head(hidden)


def test_virtual_tokens_come_before_the_labels(prompt_tuned):
    inputs = build_inputs([VIDEO_AUDIO])
    expected = expected_behind_virtual_tokens(prompt_tuned, inputs)
    handle = fmd_ext.patch(prompt_tuned, CONFIG)
    torch.testing.assert_close(prompt_tuned(**inputs).logits, expected, atol=1e-4, rtol=0)
    out = prompt_tuned.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(out.logits[0], expected[:, -1], atol=1e-4, rtol=0)
    assert handle.last_call.plan.forked.all()


def test_labels_by_hand_with_virtual_tokens(prompt_tuned):
    inputs = build_inputs([VIDEO_AUDIO])
    labels = labels_of(prompt_tuned, inputs)
    whole = torch.nn.functional.pad(labels, (VIRTUAL, 0))
    handle = fmd_ext.patch(prompt_tuned, CONFIG)
    tokens = prompt_tuned.generate(**inputs, **GREEDY)
    assert handle.runner.last == "PEFT's prompt learning gives its steps no positions"
    for given in (labels, whole):
        assert torch.equal(prompt_tuned.generate(**inputs, **GREEDY, modality_labels=given), tokens)
        with handle.labels(given):
            assert torch.equal(prompt_tuned.generate(**inputs, **GREEDY), tokens)
    logits = prompt_tuned(**inputs).logits
    assert torch.equal(prompt_tuned(**inputs, modality_labels=whole).logits, logits)
    with pytest.raises(ValueError, match="modality_labels are for 31 positions, the sequence has 34"):
        prompt_tuned(**inputs, modality_labels=labels)
    with handle.labels(labels), pytest.raises(ValueError, match="for 31 positions, the sequence has 34"):
        prompt_tuned(**inputs)
    with pytest.raises(ValueError, match=r"for 5 positions, the prompt has 31 \(and 3 virtual tokens before them\)"):
        prompt_tuned.generate(**inputs, **GREEDY, modality_labels=labels[:, :5])


def test_virtual_tokens_before_a_text_decoder():
    torch.manual_seed(0)
    dims = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    llama = LlamaForCausalLM(LlamaConfig(**dims, num_attention_heads=4, num_key_value_heads=2)).eval()
    model = wrapped(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL), llama)
    ids, labels = torch.arange(20, 29)[None], torch.tensor([[0, 1, 1, 0, 2, 2, 2, 0, 0]])
    embeds = torch.cat([model.get_prompt(1), llama.get_input_embeddings()(ids)], 1)
    whole = torch.nn.functional.pad(labels, (VIRTUAL, 0))
    config = FMDConfig(fork_layers=1).resolve(FMDConfig(), 3)
    expected = llama.lm_head(reference_hidden(llama.model, config, embeds, whole))
    fmd_ext.patch(model, config, adapter="text")
    with pytest.raises(ValueError, match="modality_labels are for 9 positions, the sequence has 12"):
        model(input_ids=ids, modality_labels=labels)
    torch.testing.assert_close(model(input_ids=ids, modality_labels=whole).logits, expected, atol=1e-4, rtol=0)
    options = {**GREEDY, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    for given in (labels, whole):
        out = model.generate(input_ids=ids, modality_labels=given, **options)
        torch.testing.assert_close(out.logits[0], expected[:, -1], atol=1e-4, rtol=0)


def test_prefix_tuning_is_refused():
    """It hands on a cache that it has filled, from transformers 5.24 on beside that of the call."""
    model = wrapped(peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL))
    fmd_ext.patch(model, CONFIG)
    with pytest.raises(ValueError, match="already holds 3 positions|two caches are given"):
        model.generate(**build_inputs([VIDEO_AUDIO]), **GREEDY)


@pytest.mark.parametrize("masking, most_rows", [("zero", 4096), ("attention", 4096), ("zero", 8)])
def test_one_adapter_per_sample(masking, most_rows, monkeypatch):
    """PEFT gives every layer one name per sample; the rows of all samples lie in one sequence there, long ones too."""
    monkeypatch.setattr(row_chunks, "MOST_ROWS", most_rows)
    model = wrapped(lora())
    model.add_adapter("b", lora())
    model.eval()
    inputs = build_inputs([VIDEO_AUDIO, AUDIO_VIDEO])
    keep = inputs["attention_mask"].bool()
    config = CONFIG.replace(masking=masking)
    rows, tokens = [], []
    for index, name in enumerate(("default", "b")):
        model.set_adapter(name)
        model.eval()
        rows.append(reference_logits(model, config, **inputs)[index])
        tokens.append(reference_generate(model, config, 4, **inputs)[index].tolist())
    model.set_adapter("default")
    model.eval()
    assert (rows[1] - reference_logits(model, config, **inputs)[1])[keep[1]].abs().max() > 0.1
    fmd_ext.patch(model, config)
    names = ["default", "b"]
    logits = model(**inputs, adapter_names=names).logits
    torch.testing.assert_close(logits[keep], torch.stack(rows)[keep], atol=1e-4, rtol=0)
    assert model.generate(**inputs, **GREEDY, adapter_names=names)[:, -4:].tolist() == tokens
    with pytest.raises(ValueError, match="adapter_names are for 3 samples, the call has 2"):
        model(**inputs, adapter_names=["default", "b", "b"])
    hooks = [m for m in model.modules() if type(m).__module__.startswith("peft.") and m._forward_hooks]
    assert hooks == []


def test_adapters_that_count_rows_are_refused():
    inputs = build_inputs([VIDEO_AUDIO])
    activated = wrapped(lora(task_type="CAUSAL_LM", alora_invocation_tokens=[40, 41]))
    poly = wrapped(peft.PolyConfig(task_type="CAUSAL_LM", r=4, target_modules=LINEARS, n_tasks=2, n_skills=2))
    lily = wrapped(peft.LilyConfig(target_modules=r"(.*language_model|model)\.layers\.\d+\.mlp\.(gate_proj|up_proj)"))
    for model, more, says in (
        (activated, {}, "this call brings alora_offsets .an aLoRA adapter"),
        (poly, {"task_ids": torch.tensor([1])}, "this call brings task_ids .Poly"),
        (lily, {}, "this call has Lily, which mixes its adapters by the mean over all rows"),
    ):
        vanilla = model(**inputs, **more).logits
        with fmd_ext.patch(model, CONFIG), pytest.raises(ValueError, match=says):
            model(**inputs, **more)
        assert torch.equal(model(**inputs, **more).logits, vanilla)


def test_scalings_by_position_are_refused():
    """As X-LoRA hands them to the layers of LoRA, by such a hook."""
    import functools

    model = wrapped(lora())
    fmd_ext.patch(model, CONFIG)

    def inject(module, args, kwargs, scalings):
        return args, kwargs

    layer = model.get_base_model().get_decoder().layers[1].self_attn.q_proj
    hook = layer.register_forward_pre_hook(functools.partial(inject, scalings=torch.ones(1)), with_kwargs=True)
    with pytest.raises(ValueError, match="this call brings scalings .X-LoRA"):
        model(**build_inputs([VIDEO_AUDIO]))
    hook.remove()
    model(**build_inputs([VIDEO_AUDIO]))


@pytest.mark.parametrize("order", ["before the patch", "after the patch"])
def test_whole_attention_modules_to_save(order):
    """PEFT keeps the original and a copy in a wrapper, which has the attributes of both but holds neither's."""
    inputs = build_inputs([VIDEO_AUDIO])
    settings = lora(target_modules=["down_proj"], modules_to_save=["self_attn"])
    reference = wrapped(copy.deepcopy(settings))
    expected, vanilla = reference_logits(reference, CONFIG, **inputs), reference(**inputs).logits
    thinker = tiny_thinker(seed=0)
    if order == "after the patch":
        fmd_ext.patch(thinker, CONFIG)
    model = wrapped(settings, thinker)
    if order == "before the patch":
        fmd_ext.patch(model, CONFIG)
    assert fmd_ext.handle_of(thinker).is_in_force
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=0)
    fmd_ext.unpatch(thinker)
    assert torch.equal(model(**inputs).logits, vanilla)
    for module in model.modules():
        assert not [name for name in module.__dict__ if name.startswith("_fmd")]
        assert not isinstance(module.__dict__.get("config"), BranchedConfig)

"""A patch is in force where its methods run; it comes off whatever lies around it; threads take turns."""

from __future__ import annotations

import copy
import functools
import threading

import pytest
import torch

import fmd_ext
from fmd_ext import FMDConfig
from fmd_ext.engine.reference import reference_logits
from fmd_ext.lab.tiny import tiny_thinker
from fmd_ext.lab.tiny.qwen3_omni import tiny_qwen3_thinker
from omni_inputs import QWEN3, VIDEO_AUDIO, build_inputs

CONFIG = FMDConfig(fork_layers=2, masking="zero", alpha=0.7).resolve(FMDConfig(), 4)


@pytest.fixture(scope="module")
def figures():
    """Inputs, unpatched logits and those of two passes, for `tiny_thinker(seed=0)`."""
    inputs, model = build_inputs([VIDEO_AUDIO]), tiny_thinker(seed=0)
    with torch.no_grad():
        return inputs, model(**inputs).logits, reference_logits(model, CONFIG, **inputs)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


# --- what replaces our methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["entry", "decoder"])
def test_a_replaced_forward_is_not_in_force(thinker, part):
    inputs = build_inputs([VIDEO_AUDIO])
    vanilla = thinker(**inputs).logits
    handle = fmd_ext.patch(thinker, CONFIG)
    assert handle.is_in_force
    module = thinker if part == "entry" else thinker.get_decoder()
    module.forward = functools.partial(type(module).forward, module)
    assert not handle.is_in_force
    with pytest.raises(RuntimeError, match=f"the forward of {type(module).__name__} was replaced after fmd_ext.patch"):
        thinker(**inputs)
    with pytest.raises(ValueError, match="parts of the patch have been replaced since.*unpatch it first"):
        fmd_ext.patch(thinker, CONFIG)
    fmd_ext.unpatch(thinker)
    assert torch.equal(thinker(**inputs).logits, vanilla)


def test_a_forward_around_ours_is_in_force(thinker):
    class Wrapper:
        def __init__(self, call):
            self.call = call

        def __call__(self, *args, **kwargs):
            return self.call(*args, **kwargs)

    inputs = build_inputs([VIDEO_AUDIO])
    handle = fmd_ext.patch(thinker, CONFIG)
    expected, own = thinker(**inputs).logits, thinker.forward
    for around in (
        lambda *args, **kwargs: own(*args, **kwargs),
        functools.partial(own),
        Wrapper(own),
        lambda *args, ours=own, **kwargs: ours(*args, **kwargs),
    ):
        thinker.forward = around
        assert handle.is_in_force
        assert torch.equal(thinker(**inputs).logits, expected)
    del thinker.__dict__["forward"]
    assert not handle.is_in_force


def test_an_attention_module_put_in_later_is_refused(figures):
    inputs, _, _ = figures
    model = tiny_thinker(seed=0)
    other = copy.deepcopy(model.get_decoder().layers[1].self_attn)
    handle = fmd_ext.patch(model, CONFIG)
    model.get_decoder().layers[1].self_attn = other
    assert not handle.is_in_force
    with pytest.raises(RuntimeError, match="attention module of layer 1 was put in after fmd_ext.patch"):
        model(**inputs)


# --- accelerate's hooks, before and after ---------------------------------------------------------------------------


def place(model, offload_dir=None):
    accelerate = pytest.importorskip("accelerate")
    leaves = {name: "cpu" for name, module in model.named_modules() if not list(module.children())}
    if offload_dir is not None:
        path = next(name for name, module in model.named_modules() if module is model.get_decoder().layers)
        leaves |= {name: "disk" for name in leaves if name.startswith(f"{path}.1.")}
    more = {} if offload_dir is None else {"offload_dir": str(offload_dir)}
    accelerate.dispatch_model(model, leaves, main_device="cpu", force_hooks=True, skip_keys="past_key_values", **more)


def take_hooks_off(model):
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)


@pytest.mark.parametrize("then", [take_hooks_off, place])
def test_hooks_taken_off_or_set_again_after_the_patch(figures, then):
    inputs, vanilla, expected = figures
    model = tiny_thinker(seed=0)
    place(model)
    handle = fmd_ext.patch(model, CONFIG)
    close(model(**inputs).logits, expected)
    then(model)
    assert handle.is_in_force
    close(model(**inputs).logits, expected)
    handle.unpatch()
    assert torch.equal(model(**inputs).logits, vanilla)
    take_hooks_off(model)
    assert torch.equal(model(**inputs).logits, vanilla)


def test_hooks_set_after_the_patch_stay_at_unpatch(figures, tmp_path, caplog):
    """They fetch weights from disk: without them the model could not run."""
    inputs, vanilla, expected = figures
    model = tiny_thinker(seed=0)
    handle = fmd_ext.patch(model, CONFIG)
    place(model, tmp_path)
    assert next(model.get_decoder().layers[1].parameters()).device.type == "meta"
    assert handle.is_in_force
    close(model(**inputs).logits, expected)
    handle.unpatch()
    assert torch.equal(model(**inputs).logits, vanilla) and "fmd_ext" not in caplog.text


def test_lora_on_an_offloaded_patched_model(figures, tmp_path):
    """PEFT takes accelerate's hooks off such a model and sets them again."""
    peft = pytest.importorskip("peft")
    inputs, _, _ = figures
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trained = peft.get_peft_model(tiny_thinker(seed=0), settings).eval()
    trained.save_pretrained(tmp_path / "adapter")
    expected = reference_logits(trained, CONFIG, **inputs)
    model = tiny_thinker(seed=0)
    place(model, tmp_path / "weights")
    handle = fmd_ext.patch(model, CONFIG)
    forward = model.forward
    with_lora = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", offload_folder=str(tmp_path / "more"))
    assert model.forward is not forward and handle.is_in_force
    close(with_lora.eval()(**inputs).logits, expected)


# --- settings through the model -------------------------------------------------------------------------------------


def test_settings_reach_the_parts_while_patched_and_after():
    model = tiny_qwen3_thinker(seed=0)
    experts = [m for m in model.get_decoder().modules() if type(m).__name__.endswith("TextExperts")]
    assert len(experts) > 1
    inputs = build_inputs([VIDEO_AUDIO], family=QWEN3)
    before = model.get_experts_implementation()
    with fmd_ext.patch(model, fork_layers=1):
        model.set_experts_implementation("eager")
        assert {m.config._experts_implementation for m in experts} == {"eager"}
        model.set_attn_implementation("eager")
        model.get_decoder().config.router_aux_loss_coef = 0.5
        forked = model(**inputs).logits  # still by our attention
        assert model.get_decoder().config._attn_implementation == "fmd_ext"
    decoder = model.get_decoder()
    assert {m.config._experts_implementation for m in experts} == {"eager"} and before != {"": "eager"}
    assert decoder.config._attn_implementation == "eager" == decoder.layers[0].self_attn.config._attn_implementation
    assert decoder.config.router_aux_loss_coef == 0.5
    assert (model(**inputs).logits - forked).abs().max() > 0.01


def test_a_copied_config_is_apart(thinker):
    fmd_ext.patch(thinker, CONFIG)
    config = thinker.get_decoder().config
    for twin in (copy.copy(config), copy.deepcopy(config)):
        twin.use_cache = not config.use_cache
        assert type(twin).__name__ == type(config).__name__ and twin.use_cache != config.use_cache


# --- replicas, threads ----------------------------------------------------------------------------------------------


def test_data_parallel_is_refused(thinker):
    fmd_ext.patch(thinker, CONFIG)
    for module in (thinker, thinker.get_decoder()):
        with pytest.raises(TypeError, match="nn.DataParallel cannot replicate a patched model: run one process"):
            module._replicate_for_data_parallel()
    fmd_ext.unpatch(thinker)
    assert thinker._replicate_for_data_parallel() is not thinker


def test_unpatch_waits_for_the_call_of_another_thread(figures):
    inputs, vanilla, _ = figures
    model = tiny_thinker(seed=0)
    options = {**inputs, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    plain = model.generate(**options)
    handle = fmd_ext.patch(model, CONFIG)
    expected, answers = model.generate(**options), []
    started, steps = threading.Event(), []

    def processor(ids, scores):
        steps.append(handle.is_in_force)
        started.set()
        return scores

    def generate():
        with torch.no_grad():
            answers.append(model.generate(**options, logits_processor=[processor]))

    thread = threading.Thread(target=generate)
    thread.start()
    started.wait(30)
    fmd_ext.unpatch(model)
    assert len(steps) == 6 and all(steps)
    thread.join()
    assert torch.equal(answers[0], expected) and not torch.equal(expected, plain)
    assert torch.equal(model(**inputs).logits, vanilla)


def test_a_call_that_waited_while_the_model_was_unpatched_runs_unpatched(figures):
    inputs, vanilla, _ = figures
    model = tiny_thinker(seed=0)
    handle = fmd_ext.patch(model, CONFIG)
    forward, results = model.forward, []

    def call(**more):
        with torch.no_grad():
            try:
                results.append(forward(**inputs, **more))
            except ValueError as error:
                results.append(error)

    labels = torch.zeros_like(inputs["input_ids"])
    with handle.labels(labels):  # which keeps other threads waiting, as a call does
        threads = [threading.Thread(target=call), threading.Thread(target=call, kwargs={"modality_labels": labels})]
        for thread in threads:
            thread.start()
        handle.unpatch()
    for thread in threads:
        thread.join()
    error = next(result for result in results if isinstance(result, ValueError))
    assert "was unpatched while the call waited for its turn" in str(error)
    assert torch.equal(next(result for result in results if result is not error).logits, vanilla)

"""Linears that run as one product: same results on every family, the same parameters, nothing left behind."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fmd_ext
from families import FAMILIES
from fmd_ext.adapters import find_adapter
from fmd_ext.lab.bench.models import sharing_weights
from fmd_ext.lab.tiny import tiny_thinker
from fmd_ext.patching.fusions import products
from omni_inputs import VIDEO_AUDIO, build_inputs
from traces import snapshot

GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def linears(monkeypatch):
    """Counts the products that ``torch.nn.functional.linear`` is asked for."""
    calls, original = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: calls.append(1) or original(*args))
    return calls


def has_memory_of_its_own(tensor):
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def places(model):
    return {name: (id(tensor), has_memory_of_its_own(tensor)) for name, tensor in model.named_parameters()}


def bytes_of(model):
    storages = {s.data_ptr(): s.nbytes() for s in (p.untyped_storage() for p in model.parameters())}
    return sum(storages.values())


def attention_of(model, layer=0):
    return find_adapter(model).find_decoder(model).layers[layer].self_attn


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_every_family_computes_the_same_and_is_itself_again(family, linears):
    model = family.make()
    inputs = family.inputs(model)
    labels = {name: inputs.pop(name) for name in ("modality_labels",) if name in inputs}
    vanilla = model(**inputs).logits
    before, where, traces, size = copy.deepcopy(model.state_dict()), places(model), snapshot(model), bytes_of(model)
    with fmd_ext.patch(model, fork_layers=2, fusions=False, **family.patch) as handle:
        assert all(fusion.why_not == "switched off by patch(..., fusions=False)" for fusion in handle.fusions.values())
        linears.clear()
        unfused = model(**inputs, **labels).logits
        count = len(linears)
        tokens = model.generate(**inputs, **labels, **GREEDY)

    handle = fmd_ext.patch(model, fork_layers=2, fusions=True, **family.patch)
    assert (handle.fusions["qkv"].places, handle.fusions["gate_up"].places) == (family.qkv, family.gate_up)
    linears.clear()
    fused = model(**inputs, **labels).logits
    assert len(linears) == count - 2 * family.qkv - family.gate_up
    torch.testing.assert_close(fused, unfused, atol=2e-5, rtol=0)
    assert (unfused - vanilla).abs().max() > 1e-3
    assert torch.equal(model.generate(**inputs, **labels, **GREEDY), tokens)
    state = model.state_dict()
    assert list(state) == list(before) and all(torch.equal(state[name], before[name]) for name in state)
    assert {name: identity for name, (identity, _) in places(model).items()} == {n: i for n, (i, _) in where.items()}
    assert bytes_of(model) == size
    apart = [name for name, (_, own) in places(model).items() if not own]
    assert len(apart) >= 3 * family.qkv + 2 * family.gate_up

    handle.unpatch()
    after = snapshot(model)
    assert before.keys() == model.state_dict().keys() and places(model) == where and bytes_of(model) == size
    assert traces.keys() == after.keys()
    assert [key for key in traces if traces[key] is not after[key] and traces[key] != after[key]] == []
    assert torch.equal(model(**inputs).logits, vanilla)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    model, inputs = tiny_thinker().to(dtype), build_inputs([VIDEO_AUDIO])
    exact = copy.deepcopy(model).float()
    logits = []
    for one, fusions in ((exact, False), (model, False), (model, True)):
        with fmd_ext.patch(one, fork_layers=2, fusions=fusions):
            logits.append(one(**inputs).logits.float())
    exact, unfused, fused = logits
    assert (fused - exact).abs().max() <= 2 * (unfused - exact).abs().max()


# --- the seam ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def joined(thinker):
    """The first attention module of a patched thinker, and its three linears as they were."""
    attention = attention_of(thinker)
    plain = copy.deepcopy([attention.q_proj, attention.k_proj, attention.v_proj])
    fmd_ext.patch(thinker, fork_layers=2, fusions=True)
    return attention, plain


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_each_linear_can_be_called_by_itself_and_nothing_is_held(joined):
    attention, plain = joined
    for linear, own in zip((attention.v_proj, attention.q_proj, attention.k_proj), plain[2:] + plain[:2], strict=True):
        rows = torch.randn(2, 3, 256)
        close(linear(rows), own(rows))
        close(linear(input=rows), own(rows))
    out = weakref.ref(attention.q_proj(rows).untyped_storage())
    alive = weakref.ref(rows)
    group = attention.q_proj.__dict__["_fmd_overrides"]["forward"].group
    assert group._held is not None
    del rows
    assert alive() is None and group._held is None and out() is None


def test_rows_that_were_written_into_are_multiplied_again(joined, linears):
    attention, (q, k, v) = joined
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            rows = torch.randn(1, 3, 256)
            linears.clear()
            attention.q_proj(rows)
            other = rows.clone()
            close(attention.k_proj(rows), k(rows))
            assert len(linears) == 2  # the product, and that of the plain k here
            close(attention.v_proj(other), v(other))
    with torch.no_grad():
        rows = torch.randn(1, 3, 256)
        attention.q_proj(rows)
        rows.mul_(2)
        close(attention.k_proj(rows), k(rows))


def test_what_is_handed_out_twice_is_not_the_same_memory(joined):
    attention, (q, _, _) = joined
    rows = torch.randn(1, 3, 256)
    first = attention.q_proj(rows)
    expected = first.clone()
    second = attention.q_proj(rows)
    second.zero_()
    assert torch.equal(first, expected)


def test_gradients_and_autocast_are_the_linears_own(joined):
    attention, (q, _, _) = joined
    rows = torch.randn(1, 3, 256)
    with torch.enable_grad():
        attention.q_proj(rows).sum().backward()
    assert attention.q_proj.weight.grad is not None
    attention.q_proj.weight.grad = attention.q_proj.bias.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention.q_proj(rows), q(rows))


def test_generate_in_inference_mode(thinker):
    inputs = build_inputs([VIDEO_AUDIO])
    with fmd_ext.patch(thinker, fork_layers=2, fusions=False):
        expected = thinker.generate(**inputs, **GREEDY)
    with torch.inference_mode(), fmd_ext.patch(thinker, fork_layers=2, fusions=True):
        assert torch.equal(thinker.generate(**inputs, **GREEDY), expected)
    assert not any(parameter.is_inference() for parameter in thinker.parameters())


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_patched_model_is_saved_as_ever(thinker, tmp_path):
    expected = copy.deepcopy(thinker.state_dict())
    with fmd_ext.patch(thinker, fork_layers=2, fusions=True):
        thinker.save_pretrained(tmp_path / "model")
        save_file(thinker.state_dict(), tmp_path / "state.safetensors")
        torch.save(thinker.state_dict(), tmp_path / "state.pt")
        twin = copy.deepcopy(thinker)
    assert sum(p.stat().st_size for p in (tmp_path / "model").glob("*.safetensors")) < 1.1 * bytes_of(thinker) + 1e5
    again = type(thinker).from_pretrained(tmp_path / "model").state_dict()
    for state in (again, load_file(tmp_path / "state.safetensors"), torch.load(tmp_path / "state.pt")):
        assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in twin.state_dict().items())


def test_a_copy_joins_its_own_parameters(thinker, linears):
    inputs = build_inputs([VIDEO_AUDIO])
    fmd_ext.patch(thinker, fork_layers=2, fusions=True)
    linears.clear()
    expected = thinker(**inputs).logits
    count = len(linears)
    twin = copy.deepcopy(thinker)
    linears.clear()
    assert torch.equal(twin(**inputs).logits, expected) and len(linears) == count
    attention_of(twin).k_proj.weight.zero_()
    assert not torch.equal(twin(**inputs).logits, expected)
    fmd_ext.unpatch(twin)
    assert all(map(has_memory_of_its_own, twin.parameters()))
    assert torch.equal(thinker(**inputs).logits, expected)


def test_two_patches_share_weights_that_are_joined_once(linears):
    inputs = build_inputs([VIDEO_AUDIO])
    one = tiny_thinker()
    other, size = sharing_weights(one), bytes_of(one)
    handles = [fmd_ext.patch(model, fork_layers=2, fusions=True) for model in (one, other)]
    linears.clear()
    expected = one(**inputs).logits
    count = len(linears)
    assert torch.equal(other(**inputs).logits, expected) and bytes_of(one) == bytes_of(other) == size
    handles[0].unpatch()
    linears.clear()
    assert torch.equal(other(**inputs).logits, expected) and len(linears) == count
    handles[1].unpatch()
    assert all(map(has_memory_of_its_own, one.parameters()))


def test_weights_that_move_are_joined_where_they_are_now(thinker, linears, caplog):
    inputs = build_inputs([VIDEO_AUDIO])
    model = copy.deepcopy(thinker)
    fmd_ext.patch(model, fork_layers=2, fusions=True)
    expected = model(**inputs).logits
    linears.clear()
    model(**inputs)
    count = len(linears)
    model.double().float()
    linears.clear()
    assert torch.equal(model(**inputs).logits, expected) and len(linears) == count
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    linears.clear()
    assert torch.equal(model(**inputs).logits, expected) and len(linears) == count
    assert caplog.text == ""


class OwnKind(nn.Parameter):
    """As the weight of a quantised or a distributed linear."""


def test_weights_that_change_their_kind_run_one_by_one_with_one_warning(thinker, caplog):
    inputs = build_inputs([VIDEO_AUDIO])
    model = copy.deepcopy(thinker)
    fmd_ext.patch(model, fork_layers=2, fusions=True)
    expected = model(**inputs).logits
    for linear in (attention_of(model, 1).q_proj, attention_of(model, 2).k_proj):
        linear.weight = OwnKind(linear.weight.data.clone())
    for _ in range(2):
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=0)
    assert caplog.text.count("linears that ran as one product run one by one: a weight is of a kind of its own") == 1


# --- what is left alone -----------------------------------------------------------------------------------------------


class OwnLinear(nn.Linear):
    """Computes as its base does, but who knows."""


def hook(module):
    module.q_proj.register_forward_hook(lambda *args: None)


def own_class(module):
    module.q_proj.__class__ = OwnLinear


def own_forward(module):
    module.q_proj.forward = module.q_proj.forward


def parametrized(module):
    nn.utils.parametrizations.weight_norm(module.q_proj)


def no_bias(module):
    module.q_proj.bias = None


def two_dtypes(module):
    module.q_proj.double()


def on_meta(module):
    module.q_proj.to("meta")


def part_of_a_buffer(module):
    weight = module.q_proj.weight
    weight.data = torch.cat([weight.data, weight.data])[: len(weight)]


def shared(module):
    module.k_proj.weight = module.v_proj.weight


def own_kind(module):
    module.q_proj.weight = OwnKind(module.q_proj.weight.data)


@pytest.mark.parametrize(
    "change, why",
    [
        (hook, "has hooks"),
        (own_class, "is no plain torch.nn.Linear"),
        (own_forward, "replaced the forward of q_proj"),
        (parametrized, "is no plain torch.nn.Linear"),
        (no_bias, "some linears have a bias"),
        (two_dtypes, "differ in dtype"),
        (on_meta, "not in memory"),
        (part_of_a_buffer, "shares its memory"),
        (shared, "belongs to several"),
        (own_kind, "a kind of its own"),
    ],
)
def test_what_is_no_plain_linear_is_left_alone(change, why):
    model = tiny_thinker()
    attention = attention_of(model, 2)
    change(attention)
    with fmd_ext.patch(model, fork_layers=2, fusions=True) as handle:
        fusion = handle.fusions["qkv"]
        assert fusion.places == 3 and why in fusion.why_not and why in str(fusion)
        assert handle.fusions["gate_up"].places == 4
        assert "_fmd_overrides" not in attention.k_proj.__dict__


def test_lora_is_left_alone():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=r".*layers\.\d+\.self_attn\.v_proj")
    model, inputs = peft.get_peft_model(tiny_thinker(), settings).eval(), build_inputs([VIDEO_AUDIO])
    with fmd_ext.patch(model, fork_layers=2, fusions=False):
        expected = model(**inputs).logits
    with fmd_ext.patch(model, fork_layers=2, fusions=True) as handle:
        assert handle.fusions["qkv"].places == 0 and "lora" in handle.fusions["qkv"].why_not
        assert handle.fusions["gate_up"].places == 4
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=0)


def test_lora_put_on_later_reads_its_columns(linears):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=r".*layers\.\d+\.self_attn\.v_proj")
    logits = []
    for fusions in (False, True):
        model, inputs = tiny_thinker(), build_inputs([VIDEO_AUDIO])
        handle = fmd_ext.patch(model, fork_layers=2, fusions=fusions)
        torch.manual_seed(0)
        logits.append(peft.get_peft_model(model, settings).eval()(**inputs).logits)
        handle.unpatch()
        assert all(map(has_memory_of_its_own, model.parameters()))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


def test_a_product_that_differs_is_left_off(thinker, monkeypatch):
    inputs = build_inputs([VIDEO_AUDIO])
    with fmd_ext.patch(thinker, fork_layers=2, fusions=False):
        expected = thinker(**inputs).logits
    original = products.JoinedLinears.__call__

    def wrong(self, index, rows):
        out = original(self, index, rows)
        return out + 0.01 if len(self.members) == 3 else out  # as if a kernel got q, k and v wrong

    monkeypatch.setattr(products.JoinedLinears, "__call__", wrong)
    with fmd_ext.patch(thinker, fork_layers=2, fusions=True) as handle:
        assert handle.fusions["qkv"].places == 0 and "on a trial it differs by 1.0e-02" in handle.fusions["qkv"].why_not
        assert handle.fusions["gate_up"].places == 4
        assert has_memory_of_its_own(attention_of(thinker).q_proj.weight)
        torch.testing.assert_close(thinker(**inputs).logits, expected, atol=1e-5, rtol=0)


def test_the_default_is_by_device_and_other_fusions_are_another_patch(thinker):
    handle = fmd_ext.patch(thinker, fork_layers=2)
    assert handle.fusions["norms"].places == 9 and "pays little on cpu" in str(handle.fusions["qkv"])
    assert fmd_ext.patch(thinker, fork_layers=2) is handle
    with pytest.raises(ValueError, match="patched already, with .*fusions=None; unpatch it first"):
        fmd_ext.patch(thinker, fork_layers=2, fusions=True)
    fmd_ext.unpatch(thinker)
    with pytest.raises(TypeError, match="fusions must be True, False or None, got 'all'"):
        fmd_ext.patch(thinker, fusions="all")
    handle = fmd_ext.patch(thinker, fork_layers=0, fusions=True)
    assert str(handle.fusions["qkv"]) == "off: the decoder runs as it is"


def test_a_patch_that_fails_gives_the_memory_back(thinker, monkeypatch):
    monkeypatch.setattr("fmd_ext.patching.handle.MergeHook", None)
    with pytest.raises(TypeError):
        fmd_ext.patch(thinker, fork_layers=2, fusions=True)
    gc.collect()
    assert all(map(has_memory_of_its_own, thinker.parameters())) and fmd_ext.handle_of(thinker) is None

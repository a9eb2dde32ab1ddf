"""Encoders whose windows run as one call: same results on every family that has windows, nothing left behind."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from transformers import AttentionInterface

import fmd_ext
from fmd_ext import compat
from fmd_ext.lab.tiny import tiny_thinker
from fmd_ext.lab.tiny.qwen3_omni import tiny_qwen3_thinker
from fmd_ext.patching.fusions import windows
from omni_inputs import QWEN3, build_inputs
from phi4_inputs import tiny_phi4
from ports import PORTS
from traces import snapshot

# Pictures whose edges leave windows of several sizes, and sounds of several and of less than one window.
CLIPS = [
    [("text", 4), ("both", (2, 12, 20), 430), ("text", 5)],
    [("text", 3), ("image", (6, 10)), ("audio", 70), ("text", 2)],
]


def plus_inputs(model):
    port = PORTS["video_salmonn2_plus_inference"]
    return port.together(model, port.batches["padded"])


# Per family: the model, its inputs, and its attention modules with windows.
FAMILIES = {
    "qwen2_5_omni": (tiny_thinker, lambda model: build_inputs(CLIPS), 4),
    "qwen3_omni": (tiny_qwen3_thinker, lambda model: build_inputs(CLIPS, family=QWEN3), 5),
    "video_salmonn2_plus": (PORTS["video_salmonn2_plus_inference"].make, plus_inputs, 2),
}


@pytest.fixture
def calls(monkeypatch):
    """Counts calls of ``scaled_dot_product_attention``."""
    made, original = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: made.append(1) or original(*a, **k))
    return made


def window_by_window(q, k, v, bounds, scale):
    """q, k, v and the result [rows, heads, head_dim]."""
    parts = zip(*(x.transpose(0, 1).tensor_split(bounds[1:-1], 1) for x in (q, k, v)), strict=True)
    own = [(q @ k.mT * scale).softmax(-1) @ v for q, k, v in parts]
    return torch.cat(own, 1).transpose(0, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same_and_is_itself_again(family, calls):
    make, inputs_of, count = FAMILIES[family]
    model = make()
    inputs, traces = inputs_of(model), snapshot(model)
    with fmd_ext.patch(model, fork_layers=2, fusions=False) as handle:
        assert handle.fusions["windows"].places == 0
        calls.clear()
        apart, calls_apart = model(**inputs).logits, len(calls)
    handle = fmd_ext.patch(model, fork_layers=2)
    assert (handle.fusions["windows"].places, handle.fusions["windows"].why_not) == (count, "")
    calls.clear()
    together, calls_together = model(**inputs).logits, len(calls)
    torch.testing.assert_close(together, apart, atol=2e-5, rtol=0)
    assert calls_together < calls_apart
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(**inputs).logits, together)
    assert windows.ATTENTION_NAME not in str(model.config.to_dict())
    handle.unpatch()
    after = snapshot(model)
    assert traces.keys() == after.keys()
    assert [key for key in traces if traces[key] is not after[key] and traces[key] != after[key]] == []
    assert {config._attn_implementation for config in configs(model)} == {"sdpa"}
    fmd_ext.unpatch(copied)
    assert {config._attn_implementation for config in configs(copied)} == {"sdpa"}


def configs(model):
    return [module.config for module in model.modules() if compat.takes_windows(module)]


def test_a_call_per_length_of_window(calls):
    """Qwen2.5-Omni's pictures and sounds: windows of the same length are one batch, whole frames too."""
    model = tiny_thinker()
    inputs = build_inputs([[("video", (3, 16, 24))]])
    tower = model.model.visual if hasattr(model.model, "visual") else model.visual
    pixels, grid = inputs["pixel_values_videos"], inputs["video_grid_thw"]
    expected = tower(pixels, grid_thw=grid).pooler_output
    assert len(calls) == 3 * 6 + 3  # one layer with windows of 8 x 8 patches, one with frames
    with fmd_ext.patch(model, fork_layers=1):
        calls.clear()
        torch.testing.assert_close(tower(pixels, grid_thw=grid).pooler_output, expected, atol=1e-5, rtol=1e-5)
        assert len(calls) == 2


@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [3, 5, 3, 1, 5], [2, 0, 7, 0], [7, 7, 2], []], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_sees_its_window(lengths, dtype):
    torch.manual_seed(0)
    rows = sum(lengths)
    q, k, v = torch.randn(3, rows, 2, 8, dtype=dtype)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    out, weights = windows.attention_to_windows(
        torch.nn.Identity(),
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        None,
        scaling=0.4,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
    )
    assert out.shape == (1, rows, 2, 8) and out.dtype == dtype and weights is None
    if rows:
        exact = window_by_window(q.double(), k.double(), v.double(), bounds.tolist(), 0.4)
        torch.testing.assert_close(out[0].double(), exact, atol=4 * torch.finfo(dtype).eps, rtol=0)


def test_what_it_does_not_have_is_refused():
    q, bounds = torch.zeros(1, 1, 3, 8), torch.tensor([0, 3]).int()
    given = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    for wrong in ({"is_causal": True}, {"attention_mask": torch.zeros(3, 3)}, {"cu_seq_lens_k": bounds.clone()}):
        call = {"attention_mask": None, **given, **wrong}
        with pytest.raises(TypeError, match=r"Identity asks for more than attention within windows.*fusions=False"):
            windows.attention_to_windows(torch.nn.Identity(), q, q, q, **call)


class TestWhereItIsLeftOff:
    def test_another_attention_was_asked_for(self):
        model = tiny_thinker()
        for module in model.modules():
            if compat.takes_windows(module):
                module.config._attn_implementation = "eager"
        with fmd_ext.patch(model, fork_layers=1) as handle:
            assert str(handle.fusions["windows"]).startswith(
                "off: Qwen2_5OmniAudioAttention was asked to run on 'eager'"
            )

    @pytest.mark.parametrize("make", [tiny_phi4, PORTS["videollama2_qwen2"].make], ids=["phi4", "videollama2"])
    def test_no_windows(self, make):
        with fmd_ext.patch(make(), fork_layers=1) as handle:
            assert str(handle.fusions["windows"]) == "off: the model has no encoder with windows"

    def test_it_computes_something_else(self, monkeypatch):
        def wrong(module, q, k, v, *args, **kwargs):
            out, weights = windows.attention_to_windows(module, q, k, v, *args, **kwargs)
            return 1.01 * out, weights

        monkeypatch.setitem(AttentionInterface._global_mapping, windows.ATTENTION_NAME, wrong)
        model = tiny_thinker()
        with fmd_ext.patch(model, fork_layers=1) as handle:
            assert handle.fusions["windows"].why_not.startswith("on a trial Qwen2_5OmniAudioAttention differs by")
            assert {config._attn_implementation for config in configs(model)} == {"sdpa"}


class TestVarlen:
    """torch's attention to all windows has no CPU kernel: these tests run it by a stand-in with torch's signatures."""

    def test_why_not(self):
        cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
        assert compat.why_no_varlen(cpu, torch.bfloat16, 2, 64, 0.125) == "torch has no such attention for cpu"
        told = compat.why_no_varlen(cuda, torch.float32, 2, 64, 0.125)
        assert told == "it takes bfloat16 and float16, not float32"
        assert "a multiple of 8, up to 256, not 36" in compat.why_no_varlen(cuda, torch.float16, 2, 36, 0.125)

    def test_torch_takes_our_arguments(self):
        names = list(inspect.signature(varlen.varlen_attn).parameters)
        assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]

    @pytest.mark.parametrize("with_scale", [False, True], ids=["torch 2.10", "since"])
    def test_it_is_one_call(self, monkeypatch, calls, with_scale):
        made = []

        def attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=None):
            lengths = cu_seq_q.diff()
            assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32 and max_q == max_k == int(lengths.max())
            made.append(len(lengths))
            return window_by_window(query, key, value, cu_seq_q.tolist(), scale or query.shape[-1] ** -0.5)

        def without(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
            return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)

        monkeypatch.setattr(varlen, "varlen_attn", attend if with_scale else without)
        model = tiny_thinker()
        inputs = build_inputs(CLIPS)
        with fmd_ext.patch(model, fork_layers=2):
            expected = model(**inputs).logits
        monkeypatch.setattr(compat, "why_no_varlen", lambda *args: "")
        with fmd_ext.patch(model, fork_layers=2) as handle:
            assert handle.fusions["windows"].places == 4
            made.clear(), calls.clear()
            torch.testing.assert_close(model(**inputs).logits, expected, atol=2e-5, rtol=0)
        assert len(made) == 2 + 2 * 2 and calls == []  # sound; picture and video, in two layers each

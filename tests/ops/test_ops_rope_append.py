"""rope_append_: rotated q, rotated k and plain v in their slots, and nothing else moves."""

from __future__ import annotations

import pytest
import torch

from attention_cases import DTYPES, ISAS, assert_as_exact, using_isa, using_threads
from fmd_ext import ops


def rotated(x, cos, sin):
    """x [rows, heads, head_dim] with cos and sin [rows, head_dim], in the dtype of x."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos[:, None].to(x.dtype) + turned * sin[:, None].to(x.dtype)


def angles(num_rows, head_dim, dtype):
    """cos and sin whose halves differ, as no model has them: every element must come from its own place."""
    turn = 100 * torch.rand(num_rows, head_dim)
    return turn.cos().to(dtype), turn.sin().to(dtype)


def make(num_rows, heads, head_dim, dtype, angle_dtype, num_slots=400):
    """All arguments by name; pools and rows with strides that no product of sizes gives."""
    num_qo_heads, num_kv_heads = heads
    cos, sin = angles(num_rows, head_dim, angle_dtype)
    return {
        **{
            name: torch.randn(num_kv_heads, num_slots + 1, head_dim + 8).to(dtype)[:, 1:, :head_dim]
            for name in ("k_pool", "v_pool")
        },
        "q_out": torch.full((num_rows, num_qo_heads, head_dim + 8), float("nan"), dtype=dtype)[..., :head_dim],
        "q": torch.randn(num_qo_heads, num_rows, head_dim).to(dtype).transpose(0, 1),
        "k": torch.randn(num_kv_heads, num_rows, head_dim).to(dtype).transpose(0, 1),
        "v": torch.randn(num_rows, num_kv_heads, head_dim).to(dtype),
        "cos": cos,
        "sin": sin,
        "slots": torch.randperm(num_slots)[:num_rows],
    }


def assert_rotated(before, after):
    """`after` is what the op makes of the arguments `before`, within rounding."""
    slots, cos, sin = before["slots"], before["cos"], before["sin"]
    dtype = before["q"].dtype
    others = torch.ones(before["k_pool"].shape[1], dtype=torch.bool)
    others[slots] = False
    for name in ("k_pool", "v_pool"):
        assert torch.equal(after[name][:, others], before[name][:, others])
    assert torch.equal(after["v_pool"][:, slots], before["v"].transpose(0, 1))
    for name, got in (("q", after["q_out"]), ("k", after["k_pool"][:, slots].transpose(0, 1))):
        want = rotated(before[name].double(), cos, sin)
        assert_as_exact(got, rotated(before[name], cos, sin), want, dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 17, 300])
@pytest.mark.parametrize("heads,head_dim", [((2, 1), 8), ((6, 2), 40), ((7, 1), 128)])
def test_like_plain_pytorch(isa, dtype, num_rows, heads, head_dim):
    for angle_dtype in {dtype, torch.float32}:
        arguments = make(num_rows, heads, head_dim, dtype, angle_dtype)
        before = {name: tensor.clone() for name, tensor in arguments.items()}
        with using_isa(isa):
            ops.rope_append_(**arguments)
        assert_rotated(before, arguments)
        assert all(torch.equal(arguments[name], before[name]) for name in ("q", "k", "v", "cos", "sin"))


def test_like_the_attention_of_transformers():
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Config, Qwen2RotaryEmbedding, apply_rotary_pos_emb

    arguments = make(9, (4, 2), 64, torch.float32, torch.float32)
    config = Qwen2Config(hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    cos, sin = Qwen2RotaryEmbedding(config)(arguments["q"], torch.arange(20, 29)[None])
    q, k = (arguments[name].transpose(0, 1)[None].clone() for name in ("q", "k"))
    want_q, want_k = apply_rotary_pos_emb(q, k, cos, sin)
    ops.rope_append_(**(arguments | {"cos": cos[0], "sin": sin[0]}))
    torch.testing.assert_close(arguments["q_out"], want_q[0].transpose(0, 1))
    torch.testing.assert_close(arguments["k_pool"][:, arguments["slots"]], want_k[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_threads_changes_no_bit(dtype):
    results = []
    for threads in (1, 3):
        torch.manual_seed(0)
        arguments = make(200, (8, 2), 64, dtype, dtype)
        with using_threads(threads):
            ops.rope_append_(**arguments)
        results.append([arguments[name] for name in ("q_out", "k_pool", "v_pool")])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_rows():
    arguments = make(0, (2, 1), 16, torch.float32, torch.float32)
    before = arguments["k_pool"].clone()
    ops.rope_append_(**arguments)
    assert torch.equal(arguments["k_pool"], before)


def test_opcheck():
    arguments = make(3, (4, 2), 8, torch.float32, torch.float32, num_slots=9)
    arguments |= {name: arguments[name].contiguous() for name in ("k_pool", "v_pool", "q_out", "q")}
    torch.library.opcheck(torch.ops.fmd_ext.rope_append_.default, tuple(arguments.values()))

"""A wrong argument of an op is a ValueError: op and argument, what was given and what is accepted."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch

from fmd_ext import ops
from fmd_ext.ops import dispatch
from fmd_ext.ops.registration import operators, refuse_by_value_error

ROWS, HEADS, KV_HEADS, DIM, SLOTS = 5, 4, 2, 16, 30


def index(*values):
    return torch.tensor(values, dtype=torch.int64)


def good(op):
    pool = torch.randn(KV_HEADS, SLOTS, DIM)
    attention = {
        "q": torch.randn(ROWS, HEADS, DIM),
        "k": pool,
        "v": pool.clone(),
        "qo_rows": index(4, 0, 2),
        "key_ranges": index(3, 5, 0, 2, 20, 10, 0, 0).view(2, 4),
        "softmax_scale": 0.25,
    }
    if op == "branched_prefill":
        return attention | {"cu_seqlens_q": index(0, 1, 3), "max_qo_len": 2}
    if op == "branched_decode":
        return attention | {"qo_rows": index(4, 0)}
    rows = torch.randn(3, KV_HEADS, DIM)
    if op == "append_":
        return {"k_pool": pool, "v_pool": pool.clone(), "k": rows, "v": rows.clone(), "slots": index(7, 0, 29)}
    if op == "rope_append_":
        shapes = {"q_out": (3, HEADS, DIM), "q": (3, HEADS, DIM), "cos": (3, DIM), "sin": (3, DIM)}
        return good("append_") | {name: torch.randn(shape) for name, shape in shapes.items()}
    weights = torch.tensor([0.5, 0.25])
    return {"hidden": torch.randn(6, DIM), "home_rows": index(0, 1), "away_rows": index(4, 5), "weights": weights}


# (argument, value, message after the argument's name)
ATTENTION = [
    ("q", torch.randn(ROWS, DIM), "has shape [5, 16], accepted is [num_rows, num_qo_heads, head_dim]"),
    ("q", torch.randn(ROWS, 3, DIM), "has 3 heads, accepted are the positive multiples of the 2 heads of k"),
    ("q", torch.randn(ROWS, HEADS, DIM).double(), "has dtype Double, accepted are Float, BFloat16 and Half"),
    ("q", torch.randn(ROWS, HEADS, 2 * DIM)[..., ::2], "has stride 2 in its last dimension, accepted is 1"),
    ("k", torch.randn(KV_HEADS, SLOTS, 8), "has shape [2, 30, 8], accepted is [num_kv_heads, num_slots, head_dim] ="),
    ("k", torch.randn(KV_HEADS, SLOTS, DIM).half(), "has dtype Half, accepted is Float"),
    ("v", torch.randn(KV_HEADS, 29, DIM), "has shape [2, 29, 16], accepted is [num_kv_heads, num_slots, head_dim] ="),
    ("v", torch.randn(KV_HEADS, SLOTS, DIM).bfloat16(), "has dtype BFloat16, accepted is Float"),
    ("qo_rows", index(4, 0, 2).int(), "has dtype Int, accepted is Long"),
    ("qo_rows", index(4, 9, 0, 9, 2)[::2].view(1, 3), "has shape [1, 3], accepted is"),
    ("key_ranges", index(3, 5, 0), "has shape [3], accepted is [num_groups, 4]"),
    ("key_ranges", index(3, 5, 0, 2, 20, 10, 0, 0).view(2, 4).float(), "has dtype Float, accepted is Long"),
    ("key_ranges", index(3, 20, 5, 10, 0, 0, 2, 0).view(4, 2).t(), "of shape [2, 4] is not contiguous"),
    ("key_ranges", index(3, 5, 0, 2, 25, 6, 0, 0).view(2, 4), "[1] has kv_start 25 and kv_len 6, accepted are ranges"),
    ("key_ranges", index(3, 5, 29, 2, 20, 10, 0, 0).view(2, 4), "[0] has prefix_start 29 and prefix_len 2, accepted"),
    ("key_ranges", index(-1, 5, 0, 2, 20, 10, 0, 0).view(2, 4), "[0] has kv_start -1 and kv_len 5, accepted are"),
    ("key_ranges", index(3, -5, 0, 2, 20, 10, 0, 0).view(2, 4), "[0] has kv_start 3 and kv_len -5, accepted are"),
    ("softmax_scale", math.nan, "is nan, accepted are finite numbers"),
    ("softmax_scale", math.inf, "is inf, accepted are finite numbers"),
]

CASES = [
    *(("branched_prefill", *case) for case in ATTENTION),
    *(("branched_decode", *case) for case in ATTENTION),
    ("branched_prefill", "qo_rows", index(4, 0, 5), "[2] is 5, accepted are 0 to 4 (rows of q)"),
    ("branched_prefill", "qo_rows", index(4, -1, 2), "[1] is -1, accepted are 0 to 4 (rows of q)"),
    ("branched_prefill", "qo_rows", index(4, 0, 4), "[2] is 4, which occurs twice"),
    ("branched_prefill", "cu_seqlens_q", index(0, 3), "has shape [2], accepted is [num_groups + 1] = [3]"),
    ("branched_prefill", "cu_seqlens_q", index(1, 2, 3), "[0] is 1, accepted is 0"),
    ("branched_prefill", "cu_seqlens_q", index(0, 2, 1), "[2] is 1, accepted are values not below the one"),
    ("branched_prefill", "cu_seqlens_q", index(0, 1, 2), "ends with 2, accepted is 3, the length of qo_rows"),
    ("branched_prefill", "max_qo_len", 1, "is 1, accepted are values from 2 on, the length of group 1"),
    ("branched_decode", "qo_rows", index(4, 0, 1), "has shape [3], accepted is [num_groups] = [2]"),
    ("branched_decode", "qo_rows", index(4, 5), "[1] is 5, accepted are 0 to 4 (rows of q)"),
    ("branched_decode", "qo_rows", index(3, 3), "[1] is 3, which occurs twice"),
    (
        "append_",
        "k_pool",
        torch.randn(SLOTS, DIM),
        "has shape [30, 16], accepted is [num_kv_heads, num_slots, head_dim]",
    ),
    ("append_", "v_pool", torch.randn(KV_HEADS, 29, DIM), "has shape [2, 29, 16], accepted is"),
    ("append_", "v_pool", torch.randn(KV_HEADS, SLOTS, DIM).half(), "has dtype Half, accepted is Float"),
    ("append_", "k_pool", torch.randn(1, SLOTS, DIM).expand(2, -1, -1), "is expanded along dimension 0, accepted"),
    (
        "append_",
        "k",
        torch.randn(3, 1, DIM),
        "has shape [3, 1, 16], accepted is [num_rows, num_kv_heads, head_dim] = [any, 2, 16]",
    ),
    ("append_", "k", torch.randn(3, KV_HEADS, DIM).bfloat16(), "has dtype BFloat16, accepted is Float"),
    (
        "append_",
        "v",
        torch.randn(4, KV_HEADS, DIM),
        "has shape [4, 2, 16], accepted is [num_rows, num_kv_heads, head_dim] = [3,",
    ),
    (
        "append_",
        "v",
        torch.randn(3, DIM, KV_HEADS).transpose(1, 2),
        "has stride 2 in its last dimension, accepted is 1",
    ),
    ("append_", "slots", index(7, 0), "has shape [2], accepted is [num_rows] = [3]"),
    ("append_", "slots", index(7, 0, 1).int(), "has dtype Int, accepted is Long"),
    ("append_", "slots", index(7, 1, 0, 1, 3, 1)[::2], "of shape [3] is not contiguous"),
    ("append_", "slots", index(7, 0, 30), "[2] is 30, accepted are 0 to 29 (slots of the pool)"),
    ("append_", "slots", index(-3, 0, 1), "[0] is -3, accepted are 0 to 29 (slots of the pool)"),
    ("merge_", "hidden", torch.randn(1, 6, DIM), "has shape [1, 6, 16], accepted is [num_rows, hidden_size]"),
    ("merge_", "hidden", torch.zeros(6, DIM, dtype=torch.int64), "has dtype Long, accepted are Float, BFloat16"),
    ("merge_", "hidden", torch.randn(DIM, 6).t(), "has stride 6 in its last dimension, accepted is 1"),
    ("merge_", "hidden", torch.randn(1, DIM).expand(6, -1), "is expanded along dimension 0, accepted"),
    ("merge_", "home_rows", index(0, 6), "[1] is 6, accepted are 0 to 5 (rows of hidden)"),
    ("merge_", "home_rows", index(1, 1), "[1] is 1, which occurs twice"),
    ("merge_", "home_rows", index(0, 1).int(), "has dtype Int, accepted is Long"),
    ("merge_", "away_rows", index(4, 6), "[1] is 6, accepted are 0 to 5 (rows of hidden)"),
    ("merge_", "away_rows", index(4, 0), "[1] is 0, which is also a home row; accepted are rows that are not"),
    ("merge_", "away_rows", index(4), "has shape [1], accepted is [num_pairs] = [2]"),
    ("merge_", "weights", torch.ones(2).double(), "has dtype Double, accepted is Float"),
    ("merge_", "weights", torch.ones(3), "has shape [3], accepted is [num_pairs] = [2]"),
    ("merge_", "weights", torch.ones(4)[::2], "of shape [2] is not contiguous"),
    ("rope_append_", "q", torch.randn(2, HEADS, DIM), "has shape [2, 4, 16], accepted is [num_rows, num_qo_heads,"),
    ("rope_append_", "q", torch.randn(3, HEADS, DIM).half(), "has dtype Half, accepted is Float"),
    ("rope_append_", "q_out", torch.randn(1, HEADS, DIM).expand(3, -1, -1), "is expanded along dimension 0, accepted"),
    ("rope_append_", "q_out", torch.randn(3, 2, DIM), "has shape [3, 2, 16], accepted is [num_rows, num_qo_heads,"),
    ("rope_append_", "cos", torch.randn(3, DIM).half(), "has dtype Half, accepted is Float"),
    ("rope_append_", "cos", torch.randn(3, 8), "has shape [3, 8], accepted is [num_rows, head_dim] = [3, 16]"),
    ("rope_append_", "sin", torch.randn(3, DIM).double(), "has dtype Double, accepted is Float"),
    ("rope_append_", "sin", torch.randn(DIM, 3).t(), "has stride 3 in its last dimension, accepted is 1"),
    ("rope_append_", "v", torch.randn(4, KV_HEADS, DIM), "has shape [4, 2, 16], accepted is [num_rows, num_kv_heads,"),
    ("rope_append_", "slots", index(7, 0, 30), "[2] is 30, accepted are 0 to 29 (slots of the pool)"),
]


# Torch's own operations take rows that are not contiguous, and float64.
KERNELS_ONLY = ("in its last dimension", "is not contiguous", "is expanded along", "has dtype Double, accepted are")
ON_BOTH_PATHS = [case for case in CASES if not any(words in case[3] for words in KERNELS_ONLY)]


@pytest.mark.parametrize("path", ["kernel", "torch"])
@pytest.mark.parametrize("op", ops.__all__)
def test_good_arguments_are_accepted(op, path):
    with dispatch.selected(path):
        getattr(ops, op)(**good(op))


@pytest.mark.parametrize("op", ops.__all__)
def test_the_first_argument_is_a_tensor(op):
    first, *_ = inspect.signature(getattr(ops, op)).parameters
    with pytest.raises(TypeError, match=f"fmd_ext::{op}: {first} is None, accepted is a tensor"):
        getattr(ops, op)(**(good(op) | {first: None}))


@pytest.mark.parametrize("op", ops.__all__)
def test_arguments_that_are_missing_or_too_many(op):
    (first, value), *others = good(op).items()
    with pytest.raises(TypeError, match=f"missing a required argument: '{first}'"):
        getattr(ops, op)(**dict(others))
    with pytest.raises(TypeError, match="too many positional arguments"):
        getattr(ops, op)(*[value] * 20)


def test_every_op_has_a_self_test_and_a_kernel_of_its_own():
    known = operators()
    assert list(known) == ops.__all__
    assert [name for name, op in known.items() if op.self_test is None or op.kernel is op.on_torch] == []


def assert_refused(path, op, argument, value, message):
    gap = "" if message.startswith("[") else " "
    said = re.escape(f"fmd_ext::{op}: {argument}{gap}{message}")
    with dispatch.selected(path), pytest.raises(ValueError, match=said):
        getattr(ops, op)(**(good(op) | {argument: value}))


@pytest.mark.parametrize("op,argument,value,message", CASES)
def test_message(op, argument, value, message):
    assert_refused("kernel", op, argument, value, message)


@pytest.mark.parametrize("op,argument,value,message", ON_BOTH_PATHS)
def test_message_on_torchs_path(op, argument, value, message):
    assert_refused("torch", op, argument, value, message)


@pytest.mark.parametrize("head_dim", [0, 4, 12, 65])
def test_head_dim(head_dim):
    pool, rows = torch.randn(2, 9, head_dim), torch.randn(3, 2, head_dim)
    message = f"has head_dim {head_dim}, accepted are the positive multiples of 8"
    with dispatch.selected("kernel"):
        with pytest.raises(ValueError, match=f"append_: k_pool {message}"):
            ops.append_(pool, pool.clone(), rows, rows, index(0, 1, 2))
        with pytest.raises(ValueError, match=f"branched_decode: q {message}"):
            ops.branched_decode(rows, pool, pool, index(0), index(0, 1, 0, 0).view(1, 4), 1.0)


@pytest.mark.parametrize(
    "op,argument",
    [
        ("append_", "k"),
        ("append_", "v"),
        ("rope_append_", "q"),
        ("merge_", "hidden"),
        *((f"branched_{x}", "q") for x in ("prefill", "decode")),
    ],
)
def test_gradients_are_refused(op, argument):
    args = good(op)
    args[argument].requires_grad_()
    with torch.enable_grad(), pytest.raises(RuntimeError, match=f"fmd_ext::{op} has no gradient: call it under"):
        getattr(ops, op)(**args)
    getattr(ops, op)(**args)  # the tests run without gradients


@pytest.mark.parametrize(
    "said,kind", [("fmd_ext::merge_: hidden has dtype Long", ValueError), ("CUDA error: out of memory", RuntimeError)]
)
def test_what_newer_torch_makes_of_a_refusal(said, kind):
    """torch 2.15 makes a RuntimeError of whatever a library throws."""

    def op(*arguments):
        raise RuntimeError(said)

    with pytest.raises(kind, match=re.escape(said)) as caught:
        refuse_by_value_error(op)(1, 2)
    assert caught.type is kind

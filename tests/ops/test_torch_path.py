"""The ops by torch's own operations: the cases of the kernels, and what only this path takes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from test_ops_branched_decode import SAMPLES
from test_ops_branched_prefill import MIXED
from test_ops_merge import merged, pairs
from test_ops_rope_append import assert_rotated
from test_ops_rope_append import make as make_rope_append

from attention_cases import DTYPES, HEADS, Group, assert_as_exact, assert_attention, expected, make_case, shared_case
from fmd_ext import ops
from fmd_ext.ops import branched_attention, dispatch

BOTH = pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])


@pytest.fixture(autouse=True)
def _on_torch():
    with dispatch.selected("torch"):
        yield


def attend(case, decode, **options):
    op, args = (ops.branched_decode, case.decode_args) if decode else (ops.branched_prefill, case.prefill_args)
    return op(*args(**options))


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 256, 12])
@pytest.mark.parametrize("heads", HEADS)
def test_attention(decode, dtype, head_dim, heads):
    case, want, plain = shared_case(SAMPLES if decode else MIXED, heads, head_dim, dtype)
    assert_attention(attend(case, decode), want, plain)


@pytest.mark.parametrize("block", [1, 2, 5, 64])
def test_blocks_of_queries(monkeypatch, block):
    """Queries in blocks of any size see what all of them at once see, those that see nothing among them."""
    groups = [*MIXED, Group(9, 4), Group(9, 4, 3)]
    case = make_case(groups, (6, 2), 64, torch.float32)
    monkeypatch.setattr(branched_attention, "BLOCK_QUERIES", block)
    assert_attention(attend(case, False), expected(case), expected(case, torch.float32))


@BOTH
@pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
def test_scale(decode, scale):
    case = dataclasses.replace(make_case(SAMPLES if decode else MIXED, (6, 2), 64, torch.float32), scale=scale)
    assert_attention(attend(case, decode), expected(case), expected(case, torch.float32))


@BOTH
def test_float64_is_computed_in_float64(decode):
    case = make_case(SAMPLES if decode else MIXED, (6, 2), 64, torch.float64)
    want, want_lse = expected(case)
    out, lse = attend(case, decode)
    assert out.dtype == torch.float64 and (out - want).abs().max() < 1e-12
    assert torch.equal(lse, want_lse.float())


@BOTH
def test_without_lse_and_without_groups(decode):
    case = make_case(SAMPLES if decode else MIXED, (6, 2), 64, torch.float32)
    out, lse = attend(case, decode, return_lse=False)
    assert lse.shape == (0,) and torch.equal(out, attend(case, decode)[0])
    out, lse = attend(make_case([], (6, 2), 64, torch.float32), decode)
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_append(dtype):
    pools = torch.randn(2, 4, 100, 20).to(dtype)
    slots, want = torch.randperm(100)[:63], pools.clone()
    k = torch.randn(4, 63, 20).to(dtype).transpose(0, 1)
    v = torch.randn(63, 4, 40).to(dtype)[..., ::2]  # rows that are not contiguous
    want[0][:, slots], want[1][:, slots] = k.transpose(0, 1), v.transpose(0, 1)
    ops.append_(*pools, k, v, slots)
    assert torch.equal(pools, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,head_dim", [((2, 1), 8), ((6, 2), 40), ((7, 1), 128)])
def test_rope_append(dtype, heads, head_dim):
    for angle_dtype in {dtype, torch.float32}:
        case = make_rope_append(33, heads, head_dim, dtype, angle_dtype)
        result = {name: tensor.clone() for name, tensor in case.items()}
        ops.rope_append_(**result)
        assert_rotated(case, result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge(dtype):
    hidden = torch.randn(300, 77).to(dtype)
    home, away, weights = pairs(300, 113)
    want = merged(hidden, home, away, weights, torch.float64)
    plain = merged(hidden, home, away, weights, torch.float32).to(dtype)
    others = torch.ones(300, dtype=torch.bool)
    others[home] = False
    before = hidden.clone()
    ops.merge_(hidden, home, away, weights)
    assert_as_exact(hidden, plain, want, dtype)
    assert torch.equal(hidden[others], before[others])


def test_index_values_are_read_back_once(monkeypatch):
    """Of tensors on a device: once per tensor, and again when it has changed."""
    monkeypatch.setattr(branched_attention, "HOST", "no type of device")
    branched_attention._read.clear()
    values = torch.tensor([1, 2, 3])
    first = branched_attention._on_host(values)
    assert first == [1, 2, 3] and branched_attention._on_host(values) is first
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            before = values.tolist()
            values.add_(1)
            assert branched_attention._on_host(values) == [x + 1 for x in before]
    view = values[:2]
    assert branched_attention._on_host(view) == values[:2].tolist()
    values.add_(1)  # as the decode runner advances its buffer, of which a plan's tensors are views
    assert branched_attention._on_host(view) == values[:2].tolist()
    with torch.inference_mode():
        held = branched_attention._on_host(plan := torch.tensor([7, 8]))
        assert held == [7, 8] and branched_attention._on_host(plan) is held
    del values, view, plan
    assert len(branched_attention._read) == 0

"""append_: rows land in their slots, bit for bit, and nothing else moves."""

from __future__ import annotations

import pytest
import torch

from attention_cases import DTYPES, using_threads
from fmd_ext import ops


def pools(num_kv_heads, num_slots, head_dim, dtype):
    """Two pools that are views into wider ones, so that no stride is the product of the sizes."""
    return [torch.randn(num_kv_heads, num_slots + 1, head_dim + 8).to(dtype)[:, 1:, :head_dim] for _ in range(2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [0, 1, 17, 300])
@pytest.mark.parametrize("num_kv_heads,head_dim", [(1, 8), (2, 40), (4, 128)])
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_land_in_their_slots(dtype, num_rows, num_kv_heads, head_dim, threads):
    k_pool, v_pool = pools(num_kv_heads, 400, head_dim, dtype)
    slots = torch.randperm(400)[:num_rows]
    # K as attention layers hand it over, [heads, rows, head_dim] seen as [rows, heads, head_dim]; V contiguous.
    k = torch.randn(num_kv_heads, num_rows, head_dim).to(dtype).transpose(0, 1)
    v = torch.randn(num_rows, num_kv_heads, head_dim).to(dtype)
    want_k, want_v = k_pool.clone(), v_pool.clone()
    want_k[:, slots], want_v[:, slots] = k.transpose(0, 1), v.transpose(0, 1)
    with using_threads(threads):
        ops.append_(k_pool, v_pool, k, v, slots)
    assert torch.equal(k_pool, want_k) and torch.equal(v_pool, want_v)


def test_nan_and_infinity_are_copied_as_they_are():
    k_pool, v_pool = pools(1, 4, 8, torch.float16)
    k = torch.tensor([float("nan"), float("inf"), -0.0, 6e-8, 1, 2, 3, 4], dtype=torch.float16).view(1, 1, 8)
    ops.append_(k_pool, v_pool, k, -k, torch.tensor([2]))
    assert torch.equal(k_pool[0, 2].view(torch.int16), k[0, 0].view(torch.int16))
    assert torch.equal(v_pool[0, 2].view(torch.int16), (-k)[0, 0].view(torch.int16))


def test_a_bad_slot_leaves_the_pools_as_they_were():
    k_pool, v_pool = pools(2, 9, 8, torch.float32)
    before = k_pool.clone(), v_pool.clone()
    rows = torch.randn(2, 2, 8)
    with pytest.raises(ValueError, match=r"append_: slots\[1\] is 9, accepted are 0 to 8"):
        ops.append_(k_pool, v_pool, rows, rows, torch.tensor([3, 9]))
    assert torch.equal(k_pool, before[0]) and torch.equal(v_pool, before[1])


def test_opcheck():
    k_pool, v_pool = torch.randn(2, 2, 9, 8)
    rows = torch.randn(3, 2, 8)
    args = (k_pool, v_pool, rows, -rows, torch.tensor([8, 0, 3]))
    torch.library.opcheck(torch.ops.fmd_ext.append_.default, args)

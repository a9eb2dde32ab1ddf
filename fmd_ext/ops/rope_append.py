"""`rope_append_`: the rotation of queries and keys, and the append."""

from __future__ import annotations

import torch
from torch import Tensor

from fmd_ext.ops.append import check_pools_and_rows, copy_into_slots
from fmd_ext.ops.arguments import Arguments
from fmd_ext.ops.registration import operator, self_test, wide
from fmd_ext.ops.selftest import HEADS, KV_HEADS, SLOTS, Inputs, Pairs, exact


@operator()
def rope_append_(
    k_pool: Tensor,
    v_pool: Tensor,
    q_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
) -> None:
    """`append_` with rotary position embedding: rotates `q` into `q_out` and `k` on its way into the pool.

    With half = head_dim / 2, the head x of row r becomes `x * cos[r] + cat(-x[half:], x[:half]) * sin[r]`, which is
    RoPE as Llama's and Qwen's attention in transformers applies it. M-RoPE is the same with cos and sin that were put
    together from its sections before. Computed in float32, rounded once.

    Args:
        k_pool, v_pool: `[num_kv_heads, num_slots, head_dim]`, last dimension contiguous.
        q_out: `[num_rows, num_qo_heads, head_dim]`, same dtype; shares no memory with `q`, `k` and `v`.
        q: the same shape and dtype.
        k, v: `[num_rows, num_kv_heads, head_dim]`, same dtype.
        cos, sin: `[num_rows, head_dim]`, both in the dtype of the pools or both float32.
        slots: int64 `[num_rows]`, in range, each slot at most once.

    Raises:
        ValueError: shape, dtype, stride or device of an argument, or a slot out of range.
        RuntimeError: a gradient would be needed.
    """
    check_pools_and_rows("rope_append_", k_pool, v_pool, k, v, slots)
    _check_rotation(k_pool, q_out, q, k, cos, sin)
    wide_cos, wide_sin = wide(cos)[:, None], wide(sin)[:, None]

    def rotated(x: Tensor) -> Tensor:
        low, high = wide(x).chunk(2, dim=-1)
        return (wide(x) * wide_cos + torch.cat([-high, low], dim=-1) * wide_sin).to(x.dtype)

    q_out.copy_(rotated(q))
    copy_into_slots(k_pool, v_pool, rotated(k), v, slots)


def _check_rotation(k_pool: Tensor, q_out: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    of = Arguments("rope_append_", k_pool=k_pool, q_out=q_out, q=q, cos=cos, sin=sin)
    num_rows, _, head_dim = k.shape
    if head_dim % 2:
        of.fail("k_pool", f"has head_dim {head_dim}, accepted are even numbers")
    of.shape("q", "[num_rows, num_qo_heads, head_dim]", num_rows, -1, head_dim)
    of.shape("q_out", "[num_rows, num_qo_heads, head_dim]", *q.shape)
    for name in ("q", "q_out"):
        of.dtype(name, k_pool.dtype)
    if cos.dtype != torch.float32:
        of.dtype("cos", k_pool.dtype)
    of.dtype("sin", cos.dtype)
    for name in ("cos", "sin"):
        of.shape(name, "[num_rows, head_dim]", num_rows, head_dim)
    of.one_device()


@self_test("rope_append_")
def _self_test(inputs: Inputs) -> Pairs:
    pools = inputs.random(2, KV_HEADS, SLOTS, inputs.head_dim)
    rows, slots = inputs.random(2, 3, KV_HEADS, inputs.head_dim), [7, 0, SLOTS - 1]
    q, (cos, sin) = inputs.random(3, HEADS, inputs.head_dim), inputs.random(2, 3, inputs.head_dim)

    def rotated(x: Tensor) -> Tensor:
        low, high = exact(x).chunk(2, dim=-1)
        return exact(x) * exact(cos)[:, None] + torch.cat([-high, low], -1) * exact(sin)[:, None]

    want = exact(pools)
    want[:, :, slots] = torch.stack([rotated(rows[0]), exact(rows[1])]).transpose(1, 2)
    q_out = torch.empty_like(q)
    rope_append_(pools[0], pools[1], q_out, q, rows[0], rows[1], cos, sin, inputs.index(slots))
    return [(pools, want), (q_out, rotated(q))]

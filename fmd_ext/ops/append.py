"""`append_`: K and V rows into their slots."""

from __future__ import annotations

from torch import Tensor

from fmd_ext.ops.arguments import POOL_LAYOUT, Arguments
from fmd_ext.ops.registration import operator, self_test
from fmd_ext.ops.selftest import KV_HEADS, SLOTS, Inputs, Pairs, exact


@operator()
def append_(k_pool: Tensor, v_pool: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Writes row r of `k` and `v` into slot `slots[r]` of the pools, in place.

    Args:
        k_pool, v_pool: `[num_kv_heads, num_slots, head_dim]`, last dimension contiguous.
        k, v: `[num_rows, num_kv_heads, head_dim]`, same dtype, any strides with a contiguous last dimension.
        slots: int64 `[num_rows]`, in range, each slot at most once.

    Raises:
        ValueError: shape, dtype, stride or device of an argument, or a slot out of range.
        RuntimeError: a gradient would be needed.
    """
    check_pools_and_rows("append_", k_pool, v_pool, k, v, slots)
    copy_into_slots(k_pool, v_pool, k, v, slots)


def check_pools_and_rows(op: str, k_pool: Tensor, v_pool: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    of = Arguments(op, k_pool=k_pool, v_pool=v_pool, k=k, v=v, slots=slots)
    of.shape("k_pool", POOL_LAYOUT, -1, -1, -1)
    num_kv_heads, num_slots, head_dim = k_pool.shape
    of.shape("v_pool", POOL_LAYOUT, *k_pool.shape)
    of.shape("k", "[num_rows, num_kv_heads, head_dim]", -1, num_kv_heads, head_dim)
    of.shape("v", "[num_rows, num_kv_heads, head_dim]", len(k), num_kv_heads, head_dim)
    of.index_vector("slots", "[num_rows]", len(k))
    of.floating("k_pool")
    for name in ("v_pool", "k", "v"):
        of.dtype(name, k_pool.dtype)
    of.one_device()
    of.rows("slots", num_slots, "slots of the pool")


def copy_into_slots(k_pool: Tensor, v_pool: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    k_pool.index_copy_(1, slots, k.transpose(0, 1))
    v_pool.index_copy_(1, slots, v.transpose(0, 1))


@self_test("append_")
def _self_test(inputs: Inputs) -> Pairs:
    pools = inputs.random(2, KV_HEADS, SLOTS, inputs.head_dim)
    rows, slots = inputs.random(2, 3, KV_HEADS, inputs.head_dim), [7, 0, SLOTS - 1]
    want = exact(pools)
    want[:, :, slots] = exact(rows).transpose(1, 2)
    append_(pools[0], pools[1], rows[0], rows[1], inputs.index(slots))
    return [(pools, want)]

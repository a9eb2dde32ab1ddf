"""`branched_prefill` and `branched_decode`: attention to a shared prefix and to an own segment.

By torch's own operations a group's keys are slices of the pools, and its attention is one
`scaled_dot_product_attention` per block of queries. Slots that no query sees are not read. A call reads its key ranges
back to the host, so that no graph can capture it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fmd_ext.ops import dispatch
from fmd_ext.ops.arguments import POOL_LAYOUT, Arguments
from fmd_ext.ops.registration import operator, self_test, wide
from fmd_ext.ops.selftest import HEADS, KV_HEADS, SLOTS, Inputs, Pairs, exact

# Queries per call of scaled_dot_product_attention: bounds its mask, [queries, keys], in a prompt of many positions.
BLOCK_QUERIES = 1024


def _empty_results(q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    lse_shape = q.shape[:2] if return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


@operator(attention=True, fake=lambda q, *others: _empty_results(q, others[-1]))
def branched_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qo_rows: Tensor,
    cu_seqlens_q: Tensor,
    key_ranges: Tensor,
    max_qo_len: int,
    softmax_scale: float,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of groups of query rows, each to a shared prefix and causally to its own segment.

    Group g holds the rows `qo_rows[cu_seqlens_q[g]:cu_seqlens_q[g + 1]]` of q, in causal order, and the keys of
    `key_ranges[g] = (kv_start, kv_len, prefix_start, prefix_len)`: its query i of qo_len attends to slots
    `prefix_start + [0, prefix_len)` and `kv_start + [0, max(0, kv_len - qo_len + i + 1))`. No other slot is read.

    Args:
        q: `[num_rows, num_qo_heads, head_dim]`, any strides with a contiguous last dimension.
        k, v: `[num_kv_heads, num_slots, head_dim]`, the pools, same dtype as q.
        qo_rows: int64 `[queries of all groups]`, each row at most once.
        cu_seqlens_q: int64 `[num_groups + 1]`, from 0 to the length of `qo_rows`.
        key_ranges: int64 `[num_groups, 4]`, in slots.
        max_qo_len: an upper bound of the groups' numbers of queries.
        softmax_scale: factor of the scores, usually `head_dim ** -0.5`.
        return_lse: also return the log-sum-exp of each row's scores.

    Returns:
        out `[num_rows, num_qo_heads, head_dim]`, contiguous, in q's dtype, and lse: float32
        `[num_rows, num_qo_heads]`, natural logarithm (an empty `[0]` tensor without `return_lse`). Rows of q in no
        group, and queries that see no key, give out = 0 and lse = -inf.

    Raises:
        ValueError: shape, dtype, stride or device of an argument, or an index out of range.
        RuntimeError: a gradient would be needed.
    """
    _check("branched_prefill", q, k, v, qo_rows, cu_seqlens_q, key_ranges, softmax_scale)
    bounds = _on_host(cu_seqlens_q)
    _check_bounds("branched_prefill", bounds, len(qo_rows), max_qo_len)
    return _by_group("branched_prefill", q, k, v, qo_rows, bounds, key_ranges, softmax_scale, return_lse)


@operator(
    attention=True,
    fake=lambda q, *others: _empty_results(q, others[-2]),
    found={"fixed_split": dispatch.splits_are_fixed},
)
def branched_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qo_rows: Tensor,
    key_ranges: Tensor,
    softmax_scale: float,
    return_lse: bool = False,
    fixed_split: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """`branched_prefill` where every group has one query, which sees all its keys; faster for that case.

    Groups of one sample stand side by side with equal `prefix_start` and `prefix_len`, so that their prefix is read
    once for all of them. Long key ranges are split among threads and combined by their log-sum-exp. On the CPU the
    split depends on a sample's own lengths only; on CUDA also on what else is in the call, and on the device, unless it
    is fixed: then a sample's result is the same bits whatever its neighbours are, among calls of the same kernel (that
    named "persistent" leaves calls of more than 4,096 groups to "split"). torch's own operations split nothing.

    Args:
        q, k, v, key_ranges, softmax_scale, return_lse: as in `branched_prefill`.
        qo_rows: int64 `[num_groups]`, the row of each group's query.
        fixed_split: None: as `fmd_ext.ops.dispatch.splits_are_fixed()` says, which honours
            `torch.use_deterministic_algorithms`.

    Returns:
        out and lse, as `branched_prefill`.

    Raises:
        ValueError: shape, dtype, stride or device of an argument, or an index out of range.
        RuntimeError: a gradient would be needed.
    """
    _check("branched_decode", q, k, v, qo_rows, None, key_ranges, softmax_scale)
    bounds = list(range(len(qo_rows) + 1))
    return _by_group("branched_decode", q, k, v, qo_rows, bounds, key_ranges, softmax_scale, return_lse)


def _check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qo_rows: Tensor,
    cu_seqlens_q: Tensor | None,
    key_ranges: Tensor,
    softmax_scale: float,
) -> None:
    """Both attention ops; cu_seqlens_q: None for decode."""
    of = Arguments(op, q=q, k=k, v=v, qo_rows=qo_rows, key_ranges=key_ranges)
    of.shape("q", "[num_rows, num_qo_heads, head_dim]", -1, -1, -1)
    of.shape("k", POOL_LAYOUT, -1, -1, q.shape[2])
    of.shape("v", POOL_LAYOUT, *k.shape)
    of.shape("key_ranges", "[num_groups, 4]", -1, 4)
    of.floating("q")
    if not k.shape[0] or not q.shape[1] or q.shape[1] % k.shape[0]:
        of.fail("q", f"has {q.shape[1]} heads, accepted are the positive multiples of the {k.shape[0]} heads of k")
    if not math.isfinite(softmax_scale):
        of.fail("softmax_scale", f"is {softmax_scale}, accepted are finite numbers")
    for name in ("k", "v"):
        of.dtype(name, q.dtype)
    if cu_seqlens_q is None:
        of.index_vector("qo_rows", "[num_groups]", len(key_ranges))
    else:
        of.tensors["cu_seqlens_q"] = cu_seqlens_q
        of.index_vector("cu_seqlens_q", "[num_groups + 1]", len(key_ranges) + 1)
        of.index_vector("qo_rows", "[queries of all groups]", -1)
    of.dtype("key_ranges", torch.int64)
    of.one_device()
    of.rows("qo_rows", len(q), "rows of q", once=True)


def _check_ranges(op: str, values: list[list[int]], num_slots: int) -> None:
    """The values of key_ranges, read back."""
    for group, (kv_start, kv_len, prefix_start, prefix_len) in enumerate(values):
        for what, start, length in (("kv", kv_start, kv_len), ("prefix", prefix_start, prefix_len)):
            if length < 0 or (length and not 0 <= start <= num_slots - length):
                raise ValueError(
                    f"fmd_ext::{op}: key_ranges[{group}] has {what}_start {start} and {what}_len {length}, accepted "
                    f"are ranges of slots 0 to {num_slots - 1}"
                )


def _check_bounds(op: str, values: list[int], num_queries: int, max_qo_len: int) -> None:
    """The values of cu_seqlens_q, read back."""
    if values[0] != 0:
        raise ValueError(f"fmd_ext::{op}: cu_seqlens_q[0] is {values[0]}, accepted is 0")
    for group, (begin, end) in enumerate(zip(values, values[1:], strict=False)):
        if end < begin:
            raise ValueError(
                f"fmd_ext::{op}: cu_seqlens_q[{group + 1}] is {end}, accepted are values not below the one before it, "
                f"{begin}"
            )
        if end - begin > max_qo_len:
            raise ValueError(
                f"fmd_ext::{op}: max_qo_len is {max_qo_len}, accepted are values from {end - begin} on, the length of "
                f"group {group}"
            )
    if values[-1] != num_queries:
        raise ValueError(
            f"fmd_ext::{op}: cu_seqlens_q ends with {values[-1]}, accepted is {num_queries}, the length of qo_rows"
        )


def _by_group(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qo_rows: Tensor,
    bounds: list[int],
    key_ranges: Tensor,
    softmax_scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Both attention ops. bounds: where each group begins in qo_rows, and the end of the last."""
    out = q.new_zeros(q.shape)
    lse = q.new_full(q.shape[:2] if return_lse else (0,), -math.inf, dtype=torch.float32)
    ranges = _on_host(key_ranges)
    _check_ranges(op, ranges, k.shape[1])
    for group, (kv_start, kv_len, prefix_start, prefix_len) in enumerate(ranges):
        rows = qo_rows[bounds[group] : bounds[group + 1]]
        num_queries = len(rows)
        own = (kv_len - num_queries + 1 + torch.arange(num_queries, device=q.device)).clamp(min=0)
        blind = max(0, num_queries - kv_len) if prefix_len == 0 else 0  # the first queries, which see nothing
        for start in range(blind, num_queries, BLOCK_QUERIES):
            stop = min(start + BLOCK_QUERIES, num_queries)
            num_own = max(0, kv_len - num_queries + stop)  # that the last query of the block sees
            keys, values = (_slots(pool, prefix_start, prefix_len, kv_start, num_own) for pool in (k, v))
            mask = None  # a single query sees all of these keys
            if stop - start > 1:
                mask = torch.arange(keys.shape[1], device=q.device) < prefix_len + own[start:stop, None]
            _attend(q, rows[start:stop], keys, values, mask, softmax_scale, out, lse if return_lse else None)
    return out, lse


def _attend(
    q: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Attention of the queries `rows` over keys and values [num_kv_heads, keys, head_dim] into their rows of `out`.

    The heads of a kv head become queries of it, so that no key is copied for them. mask: bool [queries, keys].
    """
    num_rows, num_kv_heads, head_dim = len(rows), keys.shape[0], q.shape[2]
    heads_per_kv = q.shape[1] // num_kv_heads
    queries = q[rows].view(num_rows, num_kv_heads, heads_per_kv, head_dim)
    queries = queries.permute(1, 2, 0, 3).reshape(num_kv_heads, heads_per_kv * num_rows, head_dim)
    mask = None if mask is None else mask.repeat(heads_per_kv, 1)
    attended = F.scaled_dot_product_attention(queries[None], keys[None], values[None], mask, scale=scale)
    by_head = attended.view(num_kv_heads, heads_per_kv, num_rows, head_dim)
    out.index_copy_(0, rows, by_head.permute(2, 0, 1, 3).reshape(num_rows, -1, head_dim))
    if lse is None:
        return
    scores = wide(queries) @ wide(keys).transpose(1, 2) * scale
    scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    by_head = scores.logsumexp(-1).view(num_kv_heads, heads_per_kv, num_rows)
    lse.index_copy_(0, rows, by_head.permute(2, 0, 1).reshape(num_rows, -1).float())


def _slots(pool: Tensor, prefix_start: int, prefix_len: int, own_start: int, own_len: int) -> Tensor:
    """The slots of two ranges, one after the other: [num_kv_heads, prefix_len + own_len, head_dim]."""
    ranges = [
        pool[:, start : start + size] for start, size in ((prefix_start, prefix_len), (own_start, own_len)) if size
    ]
    return ranges[0] if len(ranges) == 1 else torch.cat(ranges, dim=1)


HOST = "cpu"
_read = WeakTensorKeyDictionary()  # index tensor -> its version and its values


def _on_host(tensor: Tensor) -> list:
    """The values of an index tensor. All layers of a call are given the same tensors: each is read back once."""
    if tensor.device.type == HOST:
        return tensor.tolist()
    version = -1 if tensor.is_inference() else tensor._version  # a plan's inference tensors are never changed in place
    of_version, values = _read.get(tensor, (None, []))
    if of_version != version:
        values = tensor.tolist()
        _read[tensor] = version, values
    return values


@self_test("branched_prefill")
def _self_test_of_prefill(inputs: Inputs) -> Pairs:
    """70 queries in one group: a prefix of 40 keys, and 200 own keys of which 130 were there before."""
    q = inputs.random(70, HEADS, inputs.head_dim)
    k, v = inputs.random(2, KV_HEADS, SLOTS, inputs.head_dim)
    key_ranges = inputs.index([100, 200, 2, 40]).view(1, 4)
    groups = inputs.index([0, 70])
    out, _ = branched_prefill(q, k, v, inputs.index(range(70)), groups, key_ranges, 70, inputs.scale)
    slots = [[*range(2, 42), *range(100, 231 + i)] for i in range(70)]
    return [(out, _expected(q, k, v, slots, inputs.scale))]


@self_test("branched_decode")
def _self_test_of_decode(inputs: Inputs) -> Pairs:
    """Both branches of one sample, with a common prefix."""
    q = inputs.random(2, HEADS, inputs.head_dim)
    k, v = inputs.random(2, KV_HEADS, SLOTS, inputs.head_dim)
    key_ranges = inputs.index([100, 170, 2, 40, 290, 3, 2, 40]).view(2, 4)
    out, _ = branched_decode(q, k, v, inputs.index(range(2)), key_ranges, inputs.scale)
    slots = [[*range(2, 42), *range(100, 270)], [*range(2, 42), *range(290, 293)]]
    return [(out, _expected(q, k, v, slots, inputs.scale))]


def _expected(q: Tensor, k: Tensor, v: Tensor, slots: list[list[int]], scale: float) -> Tensor:
    """q [rows, heads, head_dim], each row over its own slots of k and v [kv_heads, slots, head_dim]."""
    visible = torch.zeros(len(q), SLOTS, dtype=torch.bool)
    for row, seen in enumerate(slots):
        visible[row, seen] = True
    k, v = (exact(pool).repeat_interleave(HEADS // KV_HEADS, dim=0) for pool in (k, v))
    scores = torch.einsum("rhd,hsd->rhs", exact(q), k) * scale
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    return torch.einsum("rhs,hsd->rhd", weights, v)

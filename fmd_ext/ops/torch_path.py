"""The ops by torch's own operations, for every device and dtype that torch has.

The same results as the kernels give, up to rounding: a group's keys are slices of the pools, its attention is one
`scaled_dot_product_attention` per block of queries. Slots that no query sees are not read. A call reads its key ranges
back to the host, so that no graph can capture it. Arguments, results and errors are those of `fmd_ext.ops.operators`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fmd_ext.ops import checks

# Queries per call of scaled_dot_product_attention: bounds its mask, [queries, keys], in a prompt of many positions.
BLOCK_QUERIES = 1024


def append_(k_pool: Tensor, v_pool: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    checks.append_("append_", k_pool, v_pool, k, v, slots)
    _copy_in(k_pool, v_pool, k, v, slots)


def _copy_in(k_pool: Tensor, v_pool: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    k_pool.index_copy_(1, slots, k.transpose(0, 1))
    v_pool.index_copy_(1, slots, v.transpose(0, 1))


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
    checks.rope_append_(k_pool, v_pool, q_out, q, k, v, cos, sin, slots)
    wide_cos, wide_sin = _wide(cos)[:, None], _wide(sin)[:, None]

    def rotated(x: Tensor) -> Tensor:
        low, high = _wide(x).chunk(2, dim=-1)
        return (_wide(x) * wide_cos + torch.cat([-high, low], dim=-1) * wide_sin).to(x.dtype)

    q_out.copy_(rotated(q))
    _copy_in(k_pool, v_pool, rotated(k), v, slots)


def merge_(hidden: Tensor, home_rows: Tensor, away_rows: Tensor, weights: Tensor) -> None:
    checks.merge_(hidden, home_rows, away_rows, weights)
    weight = weights[:, None]
    merged = weight * _wide(hidden[home_rows]) + (1 - weight) * _wide(hidden[away_rows])
    hidden.index_copy_(0, home_rows, merged.to(hidden.dtype))


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
    checks.attention("branched_prefill", q, k, v, qo_rows, cu_seqlens_q, key_ranges, softmax_scale)
    bounds = _on_host(cu_seqlens_q)
    checks.bounds("branched_prefill", bounds, len(qo_rows), max_qo_len)
    return _by_group("branched_prefill", q, k, v, qo_rows, bounds, key_ranges, softmax_scale, return_lse)


def branched_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qo_rows: Tensor,
    key_ranges: Tensor,
    softmax_scale: float,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    checks.attention("branched_decode", q, k, v, qo_rows, None, key_ranges, softmax_scale)
    bounds = list(range(len(qo_rows) + 1))
    return _by_group("branched_decode", q, k, v, qo_rows, bounds, key_ranges, softmax_scale, return_lse)


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
    checks.ranges(op, ranges, k.shape[1])
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
    scores = _wide(queries) @ _wide(keys).transpose(1, 2) * scale
    scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    by_head = scores.logsumexp(-1).view(num_kv_heads, heads_per_kv, num_rows)
    lse.index_copy_(0, rows, by_head.permute(2, 0, 1).reshape(num_rows, -1).float())


def _slots(pool: Tensor, prefix_start: int, prefix_len: int, own_start: int, own_len: int) -> Tensor:
    """The slots of two ranges, one after the other: [num_kv_heads, prefix_len + own_len, head_dim]."""
    ranges = [
        pool[:, start : start + size] for start, size in ((prefix_start, prefix_len), (own_start, own_len)) if size
    ]
    return ranges[0] if len(ranges) == 1 else torch.cat(ranges, dim=1)


def _wide(x: Tensor) -> Tensor:
    """As float32, in which the ops compute; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


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

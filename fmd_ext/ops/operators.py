"""The operators of fmd_ext: one function per op, every device.

All of them work on a slot pool: K and V of one layer, `[num_kv_heads, num_slots, head_dim]`, in which each sample owns
ranges of slots. `num_qo_heads` is a multiple of `num_kv_heads` (query head h reads kv head `h // heads_per_kv`).
Indices are int64.

An op runs fmd_ext's kernels or torch's own operations, as `fmd_ext.ops.dispatch` decides from device, dtype and
`head_dim`. The kernels take float32, bfloat16 and float16, a `head_dim` that is a multiple of 8, and rows that are
contiguous; attention on CUDA takes bfloat16 and float16 with `head_dim` 64 and 128, and pools whose rows are 16-byte
aligned. Arithmetic is float32 (float64 for float64).

A wrong argument is a ValueError that names the op, the argument, what was given and what is accepted. Index values are
checked on the CPU only: elsewhere that would wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fmd_ext.ops import dispatch, library, torch_path

_append: Callable[..., None]
_rope_append: Callable[..., None]
_merge: Callable[..., None]
_prefill: Callable[..., tuple[Tensor, Tensor]]
_decode: Callable[..., tuple[Tensor, Tensor]]
_fake: Callable[..., Any]


def refuse_by_value_error(op: Callable) -> Callable:
    """`op`, whose refusal of an argument is a ValueError in every torch.

    torch 2.15 (not yet 2.13) makes a RuntimeError of whatever a library of the stable ABI throws. RuntimeErrors that
    are no refusals, such as CUDA's, stay what they are.
    """

    def run(*arguments):
        try:
            return op(*arguments)
        except RuntimeError as error:
            if not str(error).startswith("fmd_ext::"):
                raise
            raise ValueError(str(error)) from None

    return run


if library.load()["cpu"].loaded:
    try:
        _append = refuse_by_value_error(torch.ops.fmd_ext.append_.default)
        _rope_append = refuse_by_value_error(torch.ops.fmd_ext.rope_append_.default)
        _prefill = refuse_by_value_error(torch.ops.fmd_ext.branched_prefill.default)
        _decode = refuse_by_value_error(torch.ops.fmd_ext.branched_decode.default)
        _merge = refuse_by_value_error(torch.ops.fmd_ext.merge_.default)
    except AttributeError as error:
        raise library.other_sources(library.load()["cpu"].path, str(error)) from None
    _fake = torch.library.register_fake
else:  # an installation without compiled code
    _append, _rope_append, _merge = torch_path.append_, torch_path.rope_append_, torch_path.merge_
    _prefill, _decode = torch_path.branched_prefill, torch_path.branched_decode

    def _fake_nothing(name: str) -> Callable[[Callable], Callable]:
        return lambda function: function

    _fake = _fake_nothing


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
    _refuse_gradients("append_", k, v)
    run = torch_path.append_ if _on_torch(k_pool) else _append
    run(k_pool, v_pool, k, v, slots)


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
    _refuse_gradients("rope_append_", q, k, v)
    run = torch_path.rope_append_ if _on_torch(k_pool) else _rope_append
    run(k_pool, v_pool, q_out, q, k, v, cos, sin, slots)


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
    _refuse_gradients("branched_prefill", q, k, v)
    run = torch_path.branched_prefill if _on_torch(q, attention=True) else _prefill
    return run(q, k, v, qo_rows, cu_seqlens_q, key_ranges, max_qo_len, softmax_scale, return_lse)


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
    is fixed: then a sample's result is the same bits whatever its neighbours are.

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
    _refuse_gradients("branched_decode", q, k, v)
    if _on_torch(q, attention=True):  # a group after the other: nothing is split
        return torch_path.branched_decode(q, k, v, qo_rows, key_ranges, softmax_scale, return_lse)
    fixed = dispatch.splits_are_fixed() if fixed_split is None else fixed_split
    return _decode(q, k, v, qo_rows, key_ranges, softmax_scale, return_lse, fixed)


def merge_(hidden: Tensor, home_rows: Tensor, away_rows: Tensor, weights: Tensor) -> None:
    """`hidden[home_rows[j]] = weights[j] * hidden[home_rows[j]] + (1 - weights[j]) * hidden[away_rows[j]]`, in place.

    The merge of fork-merge decoding for one pair of rows per position that has two branches. Computed in float32,
    rounded once.

    Args:
        hidden: `[num_rows, hidden_size]`, last dimension contiguous.
        home_rows: int64 `[num_pairs]`, each row at most once.
        away_rows: int64 `[num_pairs]`, none of them a home row.
        weights: float32 `[num_pairs]`.

    Raises:
        ValueError: shape, dtype, stride or device of an argument, a row out of range, a home row that occurs twice or
            is also an away row.
        RuntimeError: a gradient would be needed.
    """
    _refuse_gradients("merge_", hidden)
    run = torch_path.merge_ if dispatch.runs_on_torch(hidden.device, hidden.dtype) else _merge
    run(hidden, home_rows, away_rows, weights)


def _on_torch(tensor: Tensor, attention: bool = False) -> bool:
    """Whether an op on `tensor` [..., head_dim] runs by torch's own operations."""
    head_dim = tensor.shape[-1] if tensor.dim() else None
    return dispatch.runs_on_torch(tensor.device, tensor.dtype, head_dim, attention)


def _refuse_gradients(op: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"fmd_ext::{op} has no gradient: call it under torch.no_grad() or torch.inference_mode()")


# Shapes and dtypes without data, for torch.compile, torch.export and meta tensors.


@_fake("fmd_ext::append_")
def _append_fake(k_pool, v_pool, k, v, slots):
    return None


@_fake("fmd_ext::rope_append_")
def _rope_append_fake(k_pool, v_pool, q_out, q, k, v, cos, sin, slots):
    return None


@_fake("fmd_ext::branched_prefill")
def _branched_prefill_fake(q, k, v, qo_rows, cu_seqlens_q, key_ranges, max_qo_len, softmax_scale, return_lse):
    return _attention_outputs(q, return_lse)


@_fake("fmd_ext::branched_decode")
def _branched_decode_fake(q, k, v, qo_rows, key_ranges, softmax_scale, return_lse, fixed_split):
    return _attention_outputs(q, return_lse)


@_fake("fmd_ext::merge_")
def _merge_fake(hidden, home_rows, away_rows, weights):
    return None


def _attention_outputs(q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    lse_shape = q.shape[:2] if return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)

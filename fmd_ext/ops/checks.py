"""Checks of op arguments on torch's path, with the messages of the kernels' own checks (`csrc/torch/checks.h`).

Any strides are accepted, and every floating-point dtype. Index values are checked where they can be read without
waiting for a device: on the CPU. Each check raises ValueError.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

POOL_LAYOUT = "[num_kv_heads, num_slots, head_dim]"
# torch's C++ names of dtypes, which the kernels' messages use.
DTYPE_NAMES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
    torch.int64: "Long",
    torch.int32: "Int",
}


class Arguments:
    """The tensors of one call of `op`, by name; the first one decides about the device."""

    def __init__(self, op: str, **tensors: Tensor) -> None:
        self.op = op
        self.tensors = tensors

    def fail(self, name: str, what: str) -> None:
        gap = "" if what.startswith("[") else " "
        raise ValueError(f"fmd_ext::{self.op}: {name}{gap}{what}")

    def shape(self, name: str, layout: str, *sizes: int) -> None:
        """A size of -1 accepts any."""
        given = list(self.tensors[name].shape)
        if len(given) == len(sizes) and all(size in (-1, real) for size, real in zip(sizes, given, strict=True)):
            return
        accepted = ", ".join("any" if size == -1 else str(size) for size in sizes)
        self.fail(name, f"has shape {given}, accepted is {layout} = [{accepted}]")

    def dtype(self, name: str, dtype: torch.dtype) -> None:
        given = self.tensors[name].dtype
        if given != dtype:
            self.fail(name, f"has dtype {_name(given)}, accepted is {_name(dtype)}")

    def floating(self, name: str) -> None:
        given = self.tensors[name].dtype
        if not given.is_floating_point:
            self.fail(name, f"has dtype {_name(given)}, accepted are Float, BFloat16 and Half")

    def index_vector(self, name: str, layout: str, size: int) -> None:
        self.dtype(name, torch.int64)
        self.shape(name, layout, size)

    def one_device(self) -> None:
        first, *others = self.tensors
        accepted = self.tensors[first].device
        for name in others:
            if self.tensors[name].device != accepted:
                self.fail(name, f"is on {self.tensors[name].device}, accepted is {accepted} as for {first}")

    def rows(self, name: str, end: int, what: str, once: bool = False) -> None:
        """Values from 0 to end - 1, each at most once where `once`. Only of CPU tensors."""
        values = self.tensors[name]
        if values.device.type != "cpu":
            return
        seen = set()
        for i, value in enumerate(values.tolist()):
            if not 0 <= value < end:
                self.fail(name, f"[{i}] is {value}, accepted are 0 to {end - 1} ({what})")
            if once and value in seen:
                self.fail(name, f"[{i}] is {value}, which occurs twice")
            seen.add(value)


def append_(op: str, k_pool: Tensor, v_pool: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
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
    append_("rope_append_", k_pool, v_pool, k, v, slots)
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


def merge_(hidden: Tensor, home_rows: Tensor, away_rows: Tensor, weights: Tensor) -> None:
    of = Arguments("merge_", hidden=hidden, home_rows=home_rows, away_rows=away_rows, weights=weights)
    of.shape("hidden", "[num_rows, hidden_size]", -1, -1)
    of.index_vector("home_rows", "[num_pairs]", -1)
    of.index_vector("away_rows", "[num_pairs]", len(home_rows))
    of.dtype("weights", torch.float32)
    of.shape("weights", "[num_pairs]", len(home_rows))
    of.floating("hidden")
    of.one_device()
    of.rows("home_rows", len(hidden), "rows of hidden", once=True)
    of.rows("away_rows", len(hidden), "rows of hidden")
    if hidden.device.type == "cpu":
        homes = set(home_rows.tolist())
        for j, row in enumerate(away_rows.tolist()):
            if row in homes:
                of.fail(
                    "away_rows", f"[{j}] is {row}, which is also a home row; accepted are rows that are not written"
                )


def attention(
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


def ranges(op: str, values: list[list[int]], num_slots: int) -> None:
    """The values of key_ranges, read back."""
    for group, (kv_start, kv_len, prefix_start, prefix_len) in enumerate(values):
        for what, start, length in (("kv", kv_start, kv_len), ("prefix", prefix_start, prefix_len)):
            if length < 0 or (length and not 0 <= start <= num_slots - length):
                raise ValueError(
                    f"fmd_ext::{op}: key_ranges[{group}] has {what}_start {start} and {what}_len {length}, accepted "
                    f"are ranges of slots 0 to {num_slots - 1}"
                )


def bounds(op: str, values: list[int], num_queries: int, max_qo_len: int) -> None:
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


def _name(dtype: torch.dtype) -> str:
    return DTYPE_NAMES.get(dtype, str(dtype))

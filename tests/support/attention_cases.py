"""Inputs for the attention ops, and what plain PyTorch makes of them: a mask, a softmax, two matrix products."""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass

import torch

from fmd_ext.ops import library

ISAS = library.cpu_isas()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (num_qo_heads, num_kv_heads): group sizes 1, 3, 7.
HEADS = [(2, 2), (6, 2), (7, 1)]
HEAD_DIMS = [64, 128, 8, 40, 80, 256]


@contextlib.contextmanager
def using_isa(name):
    previous = library.cpu_isa()
    library.select_cpu_isa(name)
    try:
        yield
    finally:
        library.select_cpu_isa(previous)


@contextlib.contextmanager
def using_threads(count):
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


@dataclass(frozen=True)
class Group:
    """qo_len queries over prefix_len shared keys and kv_len of their own. Groups of one sample share the prefix."""

    qo_len: int
    kv_len: int
    prefix_len: int = 0
    sample: int = 0


@dataclass
class Case:
    q: torch.Tensor  # [num_rows, num_qo_heads, head_dim]
    k: torch.Tensor  # [num_kv_heads, num_slots, head_dim]
    v: torch.Tensor
    qo_rows: torch.Tensor
    cu_seqlens_q: torch.Tensor
    key_ranges: torch.Tensor
    max_qo_len: int
    scale: float

    def prefill_args(self, return_lse=True):
        return (
            self.q,
            self.k,
            self.v,
            self.qo_rows,
            self.cu_seqlens_q,
            self.key_ranges,
            self.max_qo_len,
            self.scale,
            return_lse,
        )

    def decode_args(self, return_lse=True):
        return self.q, self.k, self.v, self.qo_rows, self.key_ranges, self.scale, return_lse


def make_case(groups, heads=(6, 2), head_dim=64, dtype=torch.float32, seed=0, spare_rows=3, spread=1.0):
    """Rows in random order, some of them in no group; slots in random order with gaps; every unused slot is NaN."""
    generator = torch.Generator().manual_seed(seed)
    num_qo_heads, num_kv_heads = heads

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    ranges, num_slots = {}, 0
    wanted = {("prefix", g.sample, g.prefix_len): g.prefix_len for g in groups}
    wanted.update({("own", i): g.kv_len for i, g in enumerate(groups)})
    keys = list(wanted)
    for i in torch.randperm(len(keys), generator=generator).tolist():
        num_slots += int(torch.randint(0, 5, (), generator=generator))
        ranges[keys[i]] = num_slots
        num_slots += wanted[keys[i]]
    num_slots += 2
    k, v = (torch.full((num_kv_heads, num_slots, head_dim), math.nan) for _ in range(2))
    for key, start in ranges.items():
        for pool in (k, v):
            pool[:, start : start + wanted[key]] = spread * normal(num_kv_heads, wanted[key], head_dim)

    num_queries = sum(g.qo_len for g in groups)
    num_rows = num_queries + spare_rows
    q = normal(num_qo_heads, num_rows, head_dim).to(dtype).transpose(0, 1)  # not contiguous
    cu_seqlens_q = torch.tensor([0] + [g.qo_len for g in groups]).cumsum(0)
    key_ranges = [
        (ranges["own", i], g.kv_len, ranges["prefix", g.sample, g.prefix_len], g.prefix_len)
        for i, g in enumerate(groups)
    ]
    return Case(
        q=q,
        k=k.to(dtype),
        v=v.to(dtype),
        qo_rows=torch.randperm(num_rows, generator=generator)[:num_queries],
        cu_seqlens_q=cu_seqlens_q,
        key_ranges=torch.tensor(key_ranges, dtype=torch.int64).reshape(-1, 4),
        max_qo_len=max((g.qo_len for g in groups), default=0),
        scale=head_dim**-0.5,
    )


@functools.cache
def shared_case(groups, heads, head_dim, dtype):
    """(case, expected(case), expected(case, dtype)) for tests that only read them. groups: a tuple."""
    case = make_case(groups, heads, head_dim, dtype)
    return case, expected(case), expected(case, dtype)


def expected(case, dtype=torch.float64):
    """(out, lse) of plain PyTorch with all arithmetic in `dtype`."""
    out = torch.zeros(case.q.shape, dtype=dtype)
    lse = torch.full(case.q.shape[:2], -math.inf, dtype=dtype)
    heads_per_kv = case.q.shape[1] // case.k.shape[0]
    for g, (kv_start, kv_len, prefix_start, prefix_len) in enumerate(case.key_ranges.tolist()):
        rows = case.qo_rows[case.cu_seqlens_q[g] : case.cu_seqlens_q[g + 1]]
        slots = torch.cat([prefix_start + torch.arange(prefix_len), kv_start + torch.arange(kv_len)])
        if len(rows) == 0 or len(slots) == 0:
            continue
        own_seen = kv_len - len(rows) + 1 + torch.arange(len(rows))
        seen = torch.arange(len(slots)) < prefix_len + own_seen.clamp(min=0)[:, None]  # [queries, slots]
        k, v = (pool[:, slots].to(dtype).repeat_interleave(heads_per_kv, 0) for pool in (case.k, case.v))
        scores = case.q[rows].to(dtype).transpose(0, 1) @ k.transpose(1, 2) * case.scale  # [heads, queries, slots]
        scores = scores.masked_fill(~seen, -math.inf)
        lse[rows] = scores.logsumexp(-1).transpose(0, 1)
        weights = scores.softmax(-1).nan_to_num(0.0)  # a query that sees nothing
        out[rows] = (weights @ v).transpose(0, 1)
    return out, lse


def assert_attention(result, want, plain, lse_rounding=0.0):
    """(out, lse) within twice the error of plain PyTorch in the same dtype, plus rounding.

    Args:
        result: (out, lse) of an op.
        want, plain: `expected(case)` in float64 and in the dtype of the case.
        lse_rounding: absolute, what the sum of many weights may add to the error of lse.
    """
    (out, lse), (want, want_lse), (plain, plain_lse) = result, want, plain
    dtype = plain.dtype
    empty = want_lse == -math.inf
    assert out.dtype == dtype and out.is_contiguous()
    assert lse.dtype == torch.float32
    assert torch.equal(lse == -math.inf, empty), "lse is -inf where no key is visible, and nowhere else"
    assert torch.equal(out[empty], torch.zeros_like(out[empty]))
    want_lse = want_lse[~empty]
    score = want_lse.abs().max().item() if want_lse.numel() > 0 else 0.0
    assert_as_exact(out, plain, want, dtype, score)
    plain_lse = plain_lse[~empty] if dtype == torch.float32 else None
    assert_as_exact(lse[~empty], plain_lse, want_lse, torch.float32, also=lse_rounding)


def assert_as_exact(got, plain, want, dtype, score=4.0, also=0.0):
    """|got - want| <= 2 * max |plain - want| + rounding + also; plain: plain PyTorch in the same dtype, or None.

    Rounding, relative to the largest value: one unit in the last place of `dtype` for the result, and one of float32
    for a score of this size. A softmax turns an absolute error of a score into a relative one of its weight, and how
    the products of a score are ordered decides about its last place.
    """
    if want.numel() == 0:
        return
    error = (got.double() - want).abs().max()
    error_of_plain = 0.0 if plain is None else (plain.double() - want).abs().max()
    units = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * max(score, 1.0)
    rounding = units * want.abs().max().clamp(min=1.0) + also
    assert error <= 2 * error_of_plain + rounding, f"error {error:.3g}, of plain PyTorch {error_of_plain:.3g}"

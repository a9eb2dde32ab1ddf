"""What one would use instead of the branched attention ops: other libraries' attention, per branch or with a mask."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .cases import Candidate
from .checking import Reference
from .timing import Step

# Backends of scaled_dot_product_attention that are forced one by one where they exist.
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Group:
    """Queries ``rows`` [qo_len] of q, which see ``slots`` [kv_len] of the pools, the last of them causally."""

    rows: Tensor
    slots: Tensor
    prefix_len: int

    @property
    def visible(self) -> Tensor:
        """bool [qo_len, kv_len]."""
        qo_len, kv_len = len(self.rows), len(self.slots)
        return torch.ones(qo_len, kv_len, dtype=torch.bool, device=self.rows.device).tril(kv_len - qo_len)


@dataclasses.dataclass(frozen=True)
class AttentionWork:
    """One attention call: q [rows, heads, head_dim], pools k and v [kv_heads, slots, head_dim], and its groups."""

    q: Tensor
    k: Tensor
    v: Tensor
    groups: list[Group]
    scale: float
    reference: Reference

    @property
    def is_decode(self) -> bool:
        return all(len(group.rows) == 1 for group in self.groups)

    @property
    def is_batch(self) -> bool:
        """Whether the groups are samples of a batch, all of one size."""
        sizes = {(len(group.rows), len(group.slots), group.prefix_len) for group in self.groups}
        return len(self.groups) > 1 and len(sizes) == 1 and self.groups[0].prefix_len == 0


def alternatives(work: AttentionWork) -> Iterator[Candidate]:
    """Candidates for ``work``. All but the first are optional: run where they exist and take the shapes."""
    yield _sdpa(work, "SDPA per branch")
    if work.q.device.type == "cuda":
        for name, backend in BACKENDS.items():
            yield _sdpa(work, f"SDPA per branch, {name}", backend)
        yield flex_attention(work, compiled=True)
        yield _other_library(work, "flash-attn per branch", _flash_attn)
        yield _other_library(work, "FlashInfer per branch", _flashinfer)


def _sdpa(work: AttentionWork, name: str, backend: SDPBackend | None = None) -> Candidate:
    """One call of scaled_dot_product_attention per branch. In decode the query heads that share a key head go in as its
    queries, which is the faster form."""
    kv_heads, decode = work.k.shape[0], work.is_decode
    grouped = work.q.shape[1] != kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=not decode, enable_gqa=not decode and grouped, scale=work.scale
        )

    def arrange(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        queries = q.transpose(0, 1)[None].contiguous()
        if decode:
            queries = queries.reshape(1, kv_heads, q.shape[1] // kv_heads, -1)
        return queries, k[None].contiguous(), v[None].contiguous()

    def restore(out: Tensor) -> Tensor:
        return out.reshape(work.q.shape[1], -1, work.q.shape[2]).transpose(0, 1)

    candidate = (
        _batched(work, name, attend) if work.is_batch else per_branch(work, name, lambda: attend, arrange, restore)
    )
    if backend is None:
        return dataclasses.replace(candidate, optional=False)
    run = candidate.step.run

    def forced() -> Any:
        with sdpa_kernel(backend):
            return run()

    return dataclasses.replace(candidate, step=Step(forced))


def _batched(work: AttentionWork, name: str, attend: Call) -> Candidate:
    """The samples of a batch in one call of scaled_dot_product_attention, laid out before the clock starts."""
    rows, slots = (torch.stack([getattr(group, own) for group in work.groups]) for own in ("rows", "slots"))
    queries = work.q[rows].transpose(1, 2).contiguous()  # [batch, heads, rows, head_dim]
    keys, values = (pool[:, slots].transpose(0, 1).contiguous() for pool in (work.k, work.v))
    given = queries.reshape(len(rows), work.k.shape[0], -1, work.q.shape[2]) if work.is_decode else queries

    def output(attended: Tensor) -> list[Tensor]:
        out = torch.zeros(work.q.shape, dtype=work.q.dtype, device=work.q.device)
        out[rows] = attended.reshape(queries.shape).transpose(1, 2)
        return [out]

    return Candidate(name, Step(lambda: attend(given, keys, values)), output, work.reference, optional=True)


def per_branch(
    work: AttentionWork,
    name: str,
    load: Callable[[], Call],
    arrange: Callable[..., tuple[Tensor, ...]],
    restore: Callable[[Tensor], Tensor],
) -> Candidate:
    """A library's attention, once per branch, on inputs laid out as it likes before the clock starts.

    In prefill each branch runs the shared prefix too, which makes it plainly causal.

    Args:
        load: gives the function, (q, k, v) as ``arrange`` leaves them -> out.
        arrange: q [rows, heads, head_dim], k and v [kv_heads, keys, head_dim] -> the function's arguments.
        restore: out -> [rows, heads, head_dim].
    """
    branches = []
    prefix = next((group for group in work.groups if group.prefix_len == 0), None)
    for group in work.groups:
        if group is prefix and len(work.groups) > 1 and not work.is_decode:
            continue  # runs inside the branches
        whole = group.prefix_len and not work.is_decode
        rows = torch.cat([prefix.rows, group.rows]) if whole else group.rows
        if not work.is_decode and len(rows) != len(group.slots):
            raise ValueError("per-branch attention is made for a prompt given at once")
        branches.append((rows, arrange(work.q[rows], work.k[:, group.slots], work.v[:, group.slots])))
    functions: list[Call] = []

    def run() -> list[Tensor]:
        if not functions:  # in the first, untimed run: where it is not installed, this candidate is absent
            functions.append(load())
        return [functions[0](*arguments) for _, arguments in branches]

    def output(results: list[Tensor]) -> list[Tensor]:
        out = torch.zeros(work.q.shape, dtype=work.q.dtype, device=work.q.device)
        for (rows, _), result in zip(branches, results, strict=True):
            out[rows] = restore(result)
        return [out]

    return Candidate(name, Step(run), output, work.reference, optional=True)


def flex_attention(work: AttentionWork, compiled: bool) -> Candidate:
    """FlexAttention over all rows and the pools at once, with a block mask that is made before the clock starts."""
    functions: list[Call] = []
    bounds = torch.zeros(4, len(work.q), dtype=torch.int64, device=work.q.device)
    for group in work.groups:
        own = group.slots[group.prefix_len :]
        if group.prefix_len:
            bounds[0, group.rows], bounds[1, group.rows] = group.slots[0], group.slots[0] + group.prefix_len
        seen = len(own) - len(group.rows) + 1 + torch.arange(len(group.rows), device=own.device)
        bounds[2, group.rows], bounds[3, group.rows] = own[0], own[0] + seen

    def is_visible(batch: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        in_prefix = (slot >= bounds[0, row]) & (slot < bounds[1, row])
        return in_prefix | ((slot >= bounds[2, row]) & (slot < bounds[3, row]))

    def load() -> Call:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = create_block_mask(is_visible, None, None, len(work.q), work.k.shape[1], device=work.q.device)
        attend = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
        grouped = work.q.shape[1] != work.k.shape[0]
        return lambda q, k, v: attend(q, k, v, block_mask=mask, scale=work.scale, enable_gqa=grouped)

    arguments = (work.q.transpose(0, 1)[None].contiguous(), work.k[None], work.v[None])

    def run() -> Tensor:
        if not functions:
            functions.append(load())
        return functions[0](*arguments)

    return Candidate(
        "FlexAttention, block mask", Step(run), lambda out: [out[0].transpose(0, 1)], work.reference, optional=True
    )


def _other_library(work: AttentionWork, name: str, load: Callable[[AttentionWork], Call]) -> Candidate:
    """A library that takes q, k and v as [rows or keys, heads, head_dim]."""

    def arrange(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return q.contiguous(), k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()

    return per_branch(work, name, lambda: load(work), arrange, lambda out: out)


def _flash_attn(work: AttentionWork) -> Call:
    library = importlib.import_module("flash_attn")
    options = {"causal": not work.is_decode, "softmax_scale": work.scale}
    return lambda q, k, v: library.flash_attn_func(q[None], k[None], v[None], **options)[0]


def _flashinfer(work: AttentionWork) -> Call:
    library = importlib.import_module("flashinfer")
    if work.is_decode:
        return lambda q, k, v: library.single_decode_with_kv_cache(q[0], k, v, sm_scale=work.scale)[None]
    return lambda q, k, v: library.single_prefill_with_kv_cache(q, k, v, causal=True, sm_scale=work.scale)

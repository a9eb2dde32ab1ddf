"""branched_prefill and branched_decode against eager PyTorch and scaled_dot_product_attention per branch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fmd_ext import ops
from fmd_ext.plan import AttentionStep

from .cases import Candidate, Case
from .checking import Reference
from .plans import AttentionPlan, attention_plans
from .timing import Step
from .workload import Workload


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


def groups_of(step: AttentionStep, device: torch.device) -> list[Group]:
    """The query groups of an attention step, spelt out."""
    cpu = torch.device("cpu")
    rows, bounds = step.get("qo_rows", cpu), step.get("cu_seqlens_q", cpu).tolist()
    groups = []
    for g, (kv_start, kv_len, prefix_start, prefix_len) in enumerate(step.get("segments", cpu).tolist()):
        prefix = torch.arange(prefix_start, prefix_start + prefix_len)
        own = torch.arange(kv_start, kv_start + kv_len)
        slots = torch.cat([prefix, own]).to(device)
        groups.append(Group(rows[bounds[g] : bounds[g + 1]].to(device), slots, prefix_len))
    return groups


def cases(workload: Workload, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    for plan in attention_plans(workload):
        yield _case(workload, plan, dtype, device)


def _case(workload: Workload, plan: AttentionPlan, dtype: torch.dtype, device: torch.device) -> Case:
    size, step = workload.size, plan.step
    scale = size.head_dim**-0.5
    # As the model's projections and rotation leave q, and as the cache holds k and v.
    q = torch.randn(size.num_qo_heads, plan.num_rows, size.head_dim, device=device, dtype=dtype).transpose(0, 1)
    k, v = torch.randn(2, size.num_kv_heads, plan.num_slots, size.head_dim, device=device, dtype=dtype)
    groups = groups_of(step, device)
    qo_rows, segments = step.get("qo_rows", device), step.get("segments", device)
    cu_seqlens_q = step.get("cu_seqlens_q", device)

    if plan.op == "branched_decode":

        def own() -> Tensor:
            return ops.branched_decode(q, k, v, qo_rows, segments, scale)[0]

    else:

        def own() -> Tensor:
            return ops.branched_prefill(q, k, v, qo_rows, cu_seqlens_q, segments, step.max_qo_len, scale)[0]

    # Made once, since all layers share them. A single query sees everything.
    masks = [group.visible if len(group.rows) > 1 else None for group in groups]

    def eager() -> Tensor:
        return eager_attention(q, k, v, groups, masks, scale)

    reference = Reference.beside([exact_attention(q, k, v, groups, scale)], [eager()])
    candidates = [
        Candidate("fmd_ext", Step(own), lambda out: [out], reference),
        Candidate("eager PyTorch", Step(eager), lambda out: [out], reference),
        _sdpa_per_branch(q, k, v, groups, scale, reference),
    ]
    shapes = {
        "rows": plan.num_rows,
        "queries and keys": [[len(group.rows), len(group.slots)] for group in groups],
        "heads": [size.num_qo_heads, size.num_kv_heads],
        "head_dim": size.head_dim,
    }
    return Case(plan.op, plan.variant, shapes, candidates)


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, groups: list[Group], masks: list[Tensor | None], scale: float
) -> Tensor:
    """Masked softmax attention, group by group: q [rows, heads, head_dim], pools [kv_heads, slots, head_dim]."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    group_size = q.shape[1] // k.shape[0]
    for group, visible in zip(groups, masks, strict=True):
        keys = k[:, group.slots].repeat_interleave(group_size, dim=0)
        values = v[:, group.slots].repeat_interleave(group_size, dim=0)
        scores = q[group.rows].transpose(0, 1) @ keys.transpose(1, 2) * scale
        if visible is not None:
            scores.masked_fill_(~visible, -torch.inf)
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        out[group.rows] = (weights @ values).transpose(0, 1)
    return out


def exact_attention(q: Tensor, k: Tensor, v: Tensor, groups: list[Group], scale: float) -> Tensor:
    """The reference: float64, one head at a time."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for group in groups:
        hidden = torch.zeros(group.visible.shape, dtype=torch.float64, device=q.device)
        hidden[~group.visible] = -torch.inf
        for head in range(q.shape[1]):
            kv_head = head * k.shape[0] // q.shape[1]
            scores = q[group.rows, head].double() @ k[kv_head, group.slots].double().T
            out[group.rows, head] = torch.softmax(scores * scale + hidden, -1) @ v[kv_head, group.slots].double()
    return out


def _sdpa_per_branch(
    q: Tensor, k: Tensor, v: Tensor, groups: list[Group], scale: float, reference: Reference
) -> Candidate:
    """One call of scaled_dot_product_attention per branch, on inputs laid out as it likes before the clock starts.

    In prefill each branch runs the shared prefix too, which makes it plainly causal. In decode the query heads that
    share a key head go in as its queries, which is the faster form.
    """
    heads, kv_heads = q.shape[1], k.shape[0]
    decode = all(len(group.rows) == 1 for group in groups)
    branches = []  # rows, q [1, heads, queries, head_dim], k and v [1, kv_heads, keys, head_dim]
    prefix = next((group for group in groups if group.prefix_len == 0), None)
    for group in groups:
        if group is prefix and len(groups) > 1 and not decode:
            continue  # runs inside the branches
        rows = torch.cat([prefix.rows, group.rows]) if group.prefix_len and not decode else group.rows
        if not decode and len(rows) != len(group.slots):
            raise ValueError("per-branch attention is made for a prompt given at once")
        queries = q[rows].transpose(0, 1)[None].contiguous()
        if decode:
            queries = queries.reshape(1, kv_heads, heads // kv_heads, -1)
        branches.append((rows, queries, k[None, :, group.slots].contiguous(), v[None, :, group.slots].contiguous()))

    def run() -> list[Tensor]:
        return [
            F.scaled_dot_product_attention(
                queries, keys, values, is_causal=not decode, enable_gqa=not decode and heads != kv_heads, scale=scale
            )
            for _, queries, keys, values in branches
        ]

    def output(results: list[Tensor]) -> list[Tensor]:
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        for (rows, *_), result in zip(branches, results, strict=True):
            out[rows] = result.reshape(heads, len(rows), -1).transpose(0, 1)
        return [out]

    return Candidate("SDPA per branch", Step(run), output, reference)

"""branched_prefill and branched_decode against eager PyTorch and scaled_dot_product_attention per branch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fmd_ext import ops
from fmd_ext.engine.plan import LayerPlan

from .alternatives import AttentionWork, Group, alternatives
from .cases import Candidate, Case
from .checking import Reference
from .plans import AttentionPlan, attention_plans
from .roofline import Work
from .timing import Step
from .workload import Workload


def groups_of(step: LayerPlan, device: torch.device) -> list[Group]:
    """The query groups of an attention step, spelt out."""
    cpu = torch.device("cpu")
    rows, bounds = step.get("qo_rows", cpu), step.get("cu_seqlens_q", cpu).tolist()
    groups = []
    for g, (kv_start, kv_len, prefix_start, prefix_len) in enumerate(step.get("key_ranges", cpu).tolist()):
        prefix = torch.arange(prefix_start, prefix_start + prefix_len)
        own = torch.arange(kv_start, kv_start + kv_len)
        slots = torch.cat([prefix, own]).to(device)
        groups.append(Group(rows[bounds[g] : bounds[g + 1]].to(device), slots, prefix_len))
    return groups


# Query-key pairs up to which eager masked attention is a candidate: its scores take 4 bytes per head of each.
MOST_EAGER_PAIRS = 1 << 25
BLOCK_QUERIES = 2048  # of a group, whose scores eager attention holds at once


def blocks_of(groups: list[Group]) -> list[Group]:
    """The same attention in groups of at most `BLOCK_QUERIES` queries."""
    blocks = []
    for group in groups:
        num_queries, num_keys = len(group.rows), len(group.slots)
        for begin in range(0, num_queries, BLOCK_QUERIES):
            end = min(begin + BLOCK_QUERIES, num_queries)
            seen = group.slots[: num_keys - num_queries + end]
            blocks.append(Group(group.rows[begin:end], seen, group.prefix_len))
    return blocks


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
    qo_rows, segments = step.get("qo_rows", device), step.get("key_ranges", device)
    cu_seqlens_q = step.get("cu_seqlens_q", device)

    if plan.op == "branched_decode":

        def own() -> Tensor:
            return ops.branched_decode(q, k, v, qo_rows, segments, scale)[0]

    else:

        def own() -> Tensor:
            return ops.branched_prefill(q, k, v, qo_rows, cu_seqlens_q, segments, step.max_qo_len, scale)[0]

    blocks = blocks_of(groups)
    plain = eager_attention(q, k, v, blocks, masks_of(blocks), scale)
    reference = Reference.beside([exact_attention(q, k, v, blocks, scale)], [plain])
    del plain
    candidates = [Candidate("fmd_ext", Step(own), lambda out: [out], reference)]
    if plan.op == "branched_prefill" and (runs := step.causal_runs) is not None:
        by_runs = Step(lambda: runs.attend(q, k, v, scale))
        candidates.append(Candidate("fmd_ext, causal runs", by_runs, lambda out: [out], reference))
    if sum(len(group.rows) * len(group.slots) for group in groups) <= MOST_EAGER_PAIRS:
        masks = masks_of(groups)  # made once, since all layers share them
        eager = Step(lambda: eager_attention(q, k, v, groups, masks, scale))
        candidates.append(Candidate("eager PyTorch", eager, lambda out: [out], reference))
    candidates += alternatives(AttentionWork(q, k, v, groups, scale, reference))
    shapes = {
        "rows": plan.num_rows,
        "queries and keys": [[len(group.rows), len(group.slots)] for group in groups],
        "heads": [size.num_qo_heads, size.num_kv_heads],
        "head_dim": size.head_dim,
    }
    return Case(plan.op, plan.variant, shapes, candidates, least_work(q, k, groups))


def masks_of(groups: list[Group]) -> list[Tensor | None]:
    """What each group's queries see; None: a single query, which sees everything."""
    return [group.visible if len(group.rows) > 1 else None for group in groups]


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, groups: list[Group], masks: list[Tensor | None], scale: float
) -> Tensor:
    """Masked softmax attention, group by group: q [rows, heads, head_dim], pools [kv_heads, slots, head_dim]."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    heads_per_kv = q.shape[1] // k.shape[0]
    for group, visible in zip(groups, masks, strict=True):
        keys = k[:, group.slots].repeat_interleave(heads_per_kv, dim=0)
        values = v[:, group.slots].repeat_interleave(heads_per_kv, dim=0)
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


def least_work(q: Tensor, k: Tensor, groups: list[Group]) -> Work:
    """Every row read and written once, every key read once (a shared prefix once for all), two products per pair."""
    prefixes = {int(group.slots[0]): group.prefix_len for group in groups if group.prefix_len}
    keys = sum(len(group.slots) - group.prefix_len for group in groups)
    if not any(group.prefix_len == 0 and int(group.slots[0]) in prefixes for group in groups):
        keys += sum(prefixes.values())  # no group of this call is the prefix itself
    elements = 2 * q.numel() + 2 * keys * k.shape[0] * k.shape[2]
    pairs = sum(int(group.visible.sum()) for group in groups)
    return Work(elements * q.element_size(), 4 * pairs * q.shape[1] * q.shape[2])

"""rope_append_ against the steps that it joins, on the rows of a model call with zero masking."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fmd_ext import ops

from .cases import Candidate, Case
from .checking import Reference
from .plans import CallPlan, calls_of
from .roofline import Work
from .timing import Step
from .workload import Workload


def cases(workload: Workload, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    for variant, call in calls_of(workload, "rope_append_"):
        yield _rope_append_case(workload, variant, call, dtype, device)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding as transformers' attention modules write it. x [rows, heads, head_dim]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]


def _rope_append_case(
    workload: Workload, variant: str, call: CallPlan, dtype: torch.dtype, device: torch.device
) -> Case:
    """q, k and v of a layer before the merge: rotated, and k and v in their slots."""
    size, num_rows = workload.size, call.plan.num_rows
    slots = call.plan.fork.get("slots", device)
    queries = torch.randn(num_rows, size.num_qo_heads, size.head_dim, device=device, dtype=dtype)
    new = torch.randn(2, num_rows, size.num_kv_heads, size.head_dim, device=device, dtype=dtype)
    angles = torch.arange(num_rows, device=device)[:, None] * torch.logspace(0, -4, size.head_dim // 2, device=device)
    angles = torch.cat([angles, angles], dim=-1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    pools = torch.zeros(2, size.num_kv_heads, call.fork_slots, size.head_dim, device=device, dtype=dtype)

    def eager(q: Tensor, own: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        own[0].index_copy_(1, slots, rotated(k, cos, sin).transpose(0, 1))
        own[1].index_copy_(1, slots, v.transpose(0, 1))
        return rotated(q, cos, sin)

    def beside(q: Tensor, own: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ops.append_(own[0], own[1], rotated(k, cos, sin), v, slots)
        return rotated(q, cos, sin)

    def fused(q: Tensor, own: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q_out = torch.empty_like(q)
        ops.rope_append_(own[0], own[1], q_out, q, k, v, cos, sin, slots)
        return q_out

    exact_pools, plain_pools = pools.double(), pools.clone()
    exact = eager(queries.double(), exact_pools, *(x.double() for x in (*new, cos, sin)))
    plain = eager(queries, plain_pools, *new, cos, sin)
    reference = Reference.beside([exact, exact_pools[:, :, slots]], [plain, plain_pools[:, :, slots]])

    def candidate(name: str, run) -> Candidate:
        own = pools.clone()
        step = Step(lambda: run(queries, own, *new, cos, sin))
        return Candidate(name, step, lambda q_out: [q_out, own[:, :, slots]], reference)

    candidates = [candidate("fmd_ext", fused), candidate("eager, append_", beside), candidate("eager PyTorch", eager)]
    heads = {"query heads": size.num_qo_heads, "kv heads": size.num_kv_heads}
    shapes = {"rows": num_rows, **heads, "head_dim": size.head_dim}
    read = queries.numel() + new.numel() + cos.numel() + sin.numel()
    work = Work((read + queries.numel() + new.numel()) * queries.element_size())
    return Case("rope_append_", variant, shapes, candidates, work)

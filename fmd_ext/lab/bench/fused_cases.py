"""rope_append_ and merge_norm_ against the steps they join, on the rows of a model call with zero masking."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fmd_ext import FMDConfig, ops

from .cases import Candidate, Case
from .checking import Reference
from .plans import CallPlan, call_plans
from .roofline import Work
from .timing import Step
from .workload import Workload

EPS = 1e-6


def cases(workload: Workload, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    for call in call_plans(workload, "zero"):
        yield _rope_append_case(workload, call, dtype, device)
    for call in call_plans(workload, "zero"):
        yield _merge_norm_case(workload, call, dtype, device)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding as transformers' attention modules write it. x [rows, heads, head_dim]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-high, low], dim=-1) * sin[:, None]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm as transformers' decoders write it. x [rows, hidden_size]."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _rope_append_case(workload: Workload, call: CallPlan, dtype: torch.dtype, device: torch.device) -> Case:
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
        turned = torch.empty_like(q)
        ops.rope_append_(own[0], own[1], turned, q, k, v, cos, sin, slots)
        return turned

    exact_pools, plain_pools = pools.double(), pools.clone()
    exact = eager(queries.double(), exact_pools, *(x.double() for x in (*new, cos, sin)))
    plain = eager(queries, plain_pools, *new, cos, sin)
    reference = Reference.beside([exact, exact_pools[:, :, slots]], [plain, plain_pools[:, :, slots]])

    def candidate(name: str, turn) -> Candidate:
        own = pools.clone()
        step = Step(lambda: turn(queries, own, *new, cos, sin))
        return Candidate(name, step, lambda turned: [turned, own[:, :, slots]], reference)

    candidates = [candidate("fmd_ext", fused), candidate("eager, append_", beside), candidate("eager PyTorch", eager)]
    heads = {"query heads": size.num_qo_heads, "kv heads": size.num_kv_heads}
    shapes = {"rows": num_rows, **heads, "head_dim": size.head_dim}
    read = queries.numel() + new.numel() + cos.numel() + sin.numel()
    work = Work((read + queries.numel() + new.numel()) * queries.element_size())
    return Case("rope_append_", call.phase, shapes, candidates, work)


def _merge_norm_case(workload: Workload, call: CallPlan, dtype: torch.dtype, device: torch.device) -> Case:
    """The merge and the first norm after it."""
    plan, hidden_size = call.plan, workload.size.hidden_size
    home, away = plan.tensors.get("home_rows", device), plan.tensors.get("away_rows", device)
    weights = torch.tensor(FMDConfig().resolve(FMDConfig(), workload.size.num_layers).merge_weights, device=device)
    weights = weights.float()[plan.tensors.get("away_modality", device)]
    away_of_row = torch.full((plan.num_home,), -1, device=device).index_copy_(0, home, away)
    weight_of_row = torch.zeros(plan.num_home, device=device).index_copy_(0, home, weights)
    original = torch.randn(plan.num_rows, hidden_size, device=device, dtype=dtype)
    norm_weight = torch.randn(hidden_size, device=device, dtype=dtype)

    def eager(own: Tensor) -> Tensor:
        factor = weights[:, None].to(own.dtype)
        own[home] = factor * own[home] + (1 - factor) * own[away]
        return rms_norm(own[: plan.num_home], norm_weight.to(own.dtype))

    def beside(own: Tensor) -> Tensor:
        ops.merge_(own, home, away, weights)
        return rms_norm(own[: plan.num_home], norm_weight)

    def fused(own: Tensor) -> Tensor:
        return ops.merge_norm_(own, away_of_row, weight_of_row, norm_weight, EPS)

    exact_rows, plain_rows = original.double(), original.clone()
    exact, plain = eager(exact_rows), eager(plain_rows)
    home_part = slice(0, plan.num_home)
    reference = Reference.beside([exact, exact_rows[home_part]], [plain, plain_rows[home_part]])

    def candidate(name: str, merge) -> Candidate:
        own = original.clone()
        step = Step(lambda: merge(own), prepare=lambda: own.copy_(original))
        return Candidate(name, step, lambda normed: [normed, own[home_part]], reference)

    candidates = [
        candidate("fmd_ext", fused),
        candidate("merge_, eager norm", beside),
        candidate("eager PyTorch", eager),
    ]
    shapes = {"rows": plan.num_rows, "pairs": plan.num_away, "hidden_size": hidden_size}
    # Every row is read; merged home rows are written, and the norm of every home row.
    moved = (plan.num_rows + plan.num_away + plan.num_home) * hidden_size * original.element_size()
    return Case("merge_norm_", call.phase, shapes, candidates, Work(moved))

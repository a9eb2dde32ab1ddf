"""append_ and merge_ against eager PyTorch, on the rows of a model call with zero masking."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fmd_ext import FMDConfig, ops

from .cases import Candidate, Case
from .checking import Reference
from .plans import CallPlan, calls_of
from .roofline import Work
from .timing import Step
from .workload import Workload

EXACT = 0.0  # allowed error of what only moves bytes


def append_cases(workload: Workload, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    for variant, call in calls_of(workload, "append_"):
        yield _append_case(workload, variant, call, dtype, device)


def merge_cases(workload: Workload, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    for variant, call in calls_of(workload, "merge_"):
        yield _merge_case(workload, variant, call, dtype, device)


def _append_case(workload: Workload, variant: str, call: CallPlan, dtype: torch.dtype, device: torch.device) -> Case:
    """Rows into the pools of a layer before the merge. torch.cat, which copies what is there, holds both branches."""
    size, num_rows = workload.size, call.plan.num_rows
    slots = call.plan.fork.get("slots", device)
    new = torch.randn(2, size.num_kv_heads, num_rows, size.head_dim, device=device, dtype=dtype)
    k, v = new[0].transpose(0, 1), new[1].transpose(0, 1)  # [rows, kv_heads, head_dim], as the model has them
    pools = torch.zeros(2, size.num_kv_heads, call.fork_slots, size.head_dim, device=device, dtype=dtype)
    expected = pools.double()
    for row, slot in enumerate(slots.tolist()):
        expected[:, :, slot] = new[:, :, row].double()
    segments = call.plan.fork.get("key_ranges", torch.device("cpu"))
    held = int(segments[:, 1].sum() + segments[:, 3].max()) - num_rows if call.phase == "decode" else 0
    cached = torch.randn(2, size.num_kv_heads, held, size.head_dim, device=device, dtype=dtype)

    def in_place(name: str, write) -> Candidate:
        own = pools.clone()
        return Candidate(name, Step(lambda: write(own)), lambda _: [own], Reference([expected], EXACT))

    def index_copy(own: Tensor) -> None:
        own[0].index_copy_(1, slots, new[0])
        own[1].index_copy_(1, slots, new[1])

    def cat() -> tuple[Tensor, Tensor]:
        return torch.cat([cached[0], new[0]], dim=-2), torch.cat([cached[1], new[1]], dim=-2)

    joined = torch.empty(2, size.num_kv_heads, held + num_rows, size.head_dim, device=device, dtype=torch.float64)
    joined[:, :, :held], joined[:, :, held:] = cached, new
    candidates = [
        in_place("fmd_ext", lambda own: ops.append_(own[0], own[1], k, v, slots)),
        in_place("eager index_copy_", index_copy),
        Candidate("eager torch.cat", Step(cat), list, Reference(list(joined), EXACT)),
    ]
    shapes = {"rows": num_rows, "kv heads": size.num_kv_heads, "head_dim": size.head_dim, "cached": held}
    return Case("append_", variant, shapes, candidates, Work(2 * new.numel() * new.element_size()))


def _merge_case(workload: Workload, variant: str, call: CallPlan, dtype: torch.dtype, device: torch.device) -> Case:
    plan, hidden_size = call.plan, workload.size.hidden_size
    home, away = plan.tensors.get("home_rows", device), plan.tensors.get("away_rows", device)
    modality = plan.tensors.get("away_modality", device)
    merge_weights = FMDConfig().resolve(FMDConfig(), workload.size.num_layers).merge_weights
    weights = torch.tensor(merge_weights, dtype=torch.float32, device=device)[modality]
    original = torch.randn(plan.num_rows, hidden_size, device=device, dtype=dtype)
    expected = original[: plan.num_home].double()
    pairs = zip(home.tolist(), away.tolist(), weights.tolist(), strict=True)
    for home_row, away_row, weight in pairs:
        expected[home_row] = weight * original[home_row].double() + (1 - weight) * original[away_row].double()

    def in_place(name: str, write, reference: Reference) -> Candidate:
        own = original.clone()
        step = Step(lambda: write(own), prepare=lambda: own.copy_(original))
        return Candidate(name, step, lambda _: [own[: plan.num_home]], reference)

    def indexed(own: Tensor) -> None:
        factor = weights[:, None].to(dtype)
        own[home] = factor * own[home] + (1 - factor) * own[away]

    # Two whole sequences, one per branch, as two passes leave them: no index at all.
    first = original[: plan.num_home].clone()
    second = first.clone()
    second[home] = original[away]
    factors = torch.ones(plan.num_home, 1, dtype=dtype, device=device)
    factors[home, 0] = weights.to(dtype)

    plain = original.clone()
    indexed(plain)
    reference = Reference.beside([expected], [plain[: plan.num_home]])
    candidates = [
        in_place("fmd_ext", lambda own: ops.merge_(own, home, away, weights), reference),
        in_place("eager PyTorch", indexed, reference),
        Candidate(
            "eager, two sequences",
            Step(lambda: factors * first + (1 - factors) * second),
            lambda merged: [merged],
            reference,
        ),
    ]
    shapes = {"rows": plan.num_rows, "pairs": plan.num_away, "hidden_size": hidden_size}
    moved = 3 * plan.num_away * hidden_size * original.element_size()  # home and away read, home written
    return Case("merge_", variant, shapes, candidates, Work(moved))

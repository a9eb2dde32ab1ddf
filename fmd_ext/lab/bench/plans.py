"""The attention calls of a workload, as the package's own cache and planner make them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from fmd_ext import FMDConfig
from fmd_ext.config import MASKINGS
from fmd_ext.engine.cache import BranchedState
from fmd_ext.engine.plan import LayerPlan, Plan
from fmd_ext.engine.session import Session

from .workload import Extra, Size, Workload


@dataclasses.dataclass(frozen=True)
class CallPlan:
    """One forward call of the model: ``phase`` is ``prefill`` (the prompt) or ``decode`` (one token after it)."""

    phase: str
    plan: Plan
    fork_slots: int
    trunk_slots: int


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """One attention call. ``variant``: the masking, or ``merged`` for the layers after the merge."""

    op: str
    variant: str
    step: LayerPlan
    num_rows: int
    num_slots: int


def call_plans(size: Size, labels: np.ndarray, masking: str) -> Iterator[CallPlan]:
    """The plans of a prefill of ``labels`` [batch, length] and of the first decode step behind it."""
    config = FMDConfig(fork_layers=size.fork_layers, masking=masking)
    config = config.resolve(FMDConfig(), size.num_layers)
    session = Session(config)
    state = BranchedState(session, size.num_layers)
    for phase, own in (("prefill", labels), ("decode", np.zeros((len(labels), 1), np.int8))):
        plan = state.plan_call(own)
        state.commit(session.open_call(plan, own, state))
        yield CallPlan(phase, plan, state.fork_table.num_slots, state.trunk_table.num_slots)


def calls_of(workload: Workload, op: str) -> Iterator[tuple[str, CallPlan]]:
    """The calls in which an op without variants is measured, with zero masking, and what each is named."""
    for call in call_plans(workload.size, workload.prompt.labels, "zero"):
        yield call.phase, call
    for extra in workload.extras:
        if op in extra.ops:
            yield extra.variant, _call_of(workload.size, extra, "zero")


def _call_of(size: Size, extra: Extra, masking: str) -> CallPlan:
    return next(call for call in call_plans(size, extra.labels, masking) if call.phase == extra.phase)


def attention_plans(workload: Workload) -> Iterator[AttentionPlan]:
    size = workload.size
    calls = {masking: list(call_plans(size, workload.prompt.labels, masking)) for masking in MASKINGS}
    for index, op in enumerate(("branched_prefill", "branched_decode")):
        merged = calls["zero"][index]
        yield AttentionPlan(op, "merged", merged.plan.trunk, merged.plan.num_home, merged.trunk_slots)
        for masking in MASKINGS:
            call = calls[masking][index]
            yield AttentionPlan(op, masking, call.plan.fork, call.plan.num_rows, call.fork_slots)
        for extra in (extra for extra in workload.extras if op in extra.ops):
            if not extra.labels.any():
                call = _call_of(size, extra, "zero")
                yield AttentionPlan(op, extra.variant, call.plan.trunk, call.plan.num_home, call.trunk_slots)
                continue
            for masking in MASKINGS:
                call = _call_of(size, extra, masking)
                variant = f"{extra.variant}, {masking}"
                yield AttentionPlan(op, variant, call.plan.fork, call.plan.num_rows, call.fork_slots)

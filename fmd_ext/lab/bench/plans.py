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

from .workload import Workload


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


def call_plans(workload: Workload, masking: str) -> Iterator[CallPlan]:
    """The plans of prefill and of the first decode step."""
    config = FMDConfig(fork_layers=workload.size.fork_layers, masking=masking)
    config = config.resolve(FMDConfig(), workload.size.num_layers)
    session = Session(config)
    state = BranchedState(session, workload.size.num_layers)
    for phase, labels in (("prefill", workload.prompt.labels), ("decode", np.zeros((1, 1), np.int8))):
        plan = state.plan_call(labels)
        state.commit(session.open_call(plan, labels, state))
        yield CallPlan(phase, plan, state.fork_table.num_slots, state.trunk_table.num_slots)


def attention_plans(workload: Workload) -> Iterator[AttentionPlan]:
    calls = {masking: list(call_plans(workload, masking)) for masking in MASKINGS}
    for index, op in enumerate(("branched_prefill", "branched_decode")):
        merged = calls["zero"][index]
        yield AttentionPlan(op, "merged", merged.plan.trunk, merged.plan.num_home, merged.trunk_slots)
        for masking in MASKINGS:
            call = calls[masking][index]
            yield AttentionPlan(op, masking, call.plan.fork, call.plan.num_rows, call.fork_slots)

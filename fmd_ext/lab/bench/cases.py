"""A benchmark case: candidates for the same work, and how they are checked and timed."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .checking import Reference, WrongOutput
from .roofline import Work
from .timing import Spread, Step, interleave, ratios, rounds_for


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to do the work.

    Args:
        name: shown in the report.
        step: what is timed.
        output: what ``step.run`` returned -> tensors in the order and layout of the reference; not timed.
        reference: what they must be.
        optional: may be absent: where its first run fails, the report says why and the others are measured.
    """

    name: str
    step: Step
    output: Callable[[Any], Sequence[Tensor]]
    reference: Reference
    optional: bool = False

    def check(self, case: str, result: Any) -> float:
        return self.reference.check(f"{case}, {self.name}", self.output(result))


@dataclasses.dataclass(frozen=True)
class Case:
    """Candidates for the same work.

    Args:
        op: the op's stem, or ``model_prefill`` or ``model_decode``.
        variant: which situation.
        shapes: sizes, for the report.
        candidates: the first is the one that ratios are taken over.
        work: the least that it asks for, where that is known.
    """

    op: str
    variant: str
    shapes: dict[str, Any]
    candidates: Sequence[Candidate]
    work: Work | None = None

    @property
    def name(self) -> str:
        return f"{self.op}/{self.variant}"


def run_case(case: Case, device: torch.device, rounds: int | None, budget: float) -> dict[str, Any]:
    """Checks every candidate, warms up, times, and checks again what the last timed round gave.

    Args:
        rounds: of all candidates in turn; None: as many as fit into ``budget`` seconds.

    Returns:
        The case as JSON holds it. Where an output is wrong there are no times, only ``error``.
    """
    report: dict[str, Any] = {"case": case.name, "shapes": case.shapes}
    try:
        errors: dict[str, float] = {}
        absent: dict[str, str] = {}
        for candidate in case.candidates:
            candidate.step.prepare()
            try:
                result = candidate.step.run()
            except Exception as error:
                if not candidate.optional:
                    raise
                absent[candidate.name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                continue
            errors[candidate.name] = candidate.check(case.name, result)
        present = [candidate for candidate in case.candidates if candidate.name in errors]
        steps = {candidate.name: candidate.step for candidate in present}
        begin = time.perf_counter()
        interleave(steps, 1, device)  # warm-up, and the estimate
        rounds = rounds or rounds_for(time.perf_counter() - begin, budget)
        with tqdm(total=rounds, desc=case.name, file=sys.stderr, delay=1, leave=False, disable=None) as bar:
            seconds, last = interleave(steps, rounds, device, bar.update)
        for candidate in present:
            errors[candidate.name] = max(errors[candidate.name], candidate.check(case.name, last[candidate.name]))
    except WrongOutput as wrong:
        return {**report, "error": str(wrong)}
    baseline = seconds[case.candidates[0].name]
    report["rounds"] = rounds
    if absent:
        report["absent"] = absent
    report["candidates"] = [
        {
            "name": name,
            "seconds": dataclasses.asdict(Spread.of(own)),
            "ratio": dataclasses.asdict(Spread.of(ratios(own, baseline))),
            "error": errors[name],
        }
        for name, own in seconds.items()
    ]
    return report

"""Interleaved timing: all candidates once per round, so that whatever else the machine does hits all of them alike.

Each round has its own order: a candidate would otherwise always find the caches as the same other one leaves them.

On CUDA a step begins behind other work, as an op does within a model: the host is ahead with its launches, and what the
step reads has left the cache. A step that is a whole model begins on an idle device, and what its launches cost counts.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

# Fewer rounds let the median ratio of whole models wander by 5 % on a shared machine.
MIN_ROUNDS, MAX_ROUNDS = 21, 200
# What a step on CUDA begins behind: several times the largest cache, and about a millisecond.
OTHER_BYTES, OTHER_CYCLES = 1 << 28, 2_000_000


@dataclasses.dataclass(frozen=True)
class Step:
    """What is timed: ``run()``, after an untimed ``prepare()``; on CUDA ``from_idle`` or behind other work."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None
    from_idle: bool = False


@dataclasses.dataclass(frozen=True)
class Spread:
    """Smallest, quartiles and median of a sample."""

    min: float
    q1: float
    median: float
    q3: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> Spread:
        if len(sample) == 1:
            return cls(*[sample[0]] * 4)
        q1, median, q3 = statistics.quantiles(sample, n=4, method="inclusive")
        return cls(min(sample), q1, median, q3)


def rounds_for(seconds_per_round: float, budget: float) -> int:
    """How many rounds of all candidates fit into ``budget`` seconds, within bounds."""
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget / max(seconds_per_round, 1e-9))))


def interleave(
    steps: Mapping[str, Step], rounds: int, device: torch.device, on_round: Callable[[], Any] = lambda: None
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Runs ``rounds`` rounds of all steps, each round in another (reproducible) order.

    Returns:
        Seconds per step, round by round, and the last result of each step.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    last: dict[str, Any] = {}
    shuffle = random.Random(0).sample
    for _ in range(rounds):
        for name, step in shuffle(list(steps.items()), len(steps)):
            last.pop(name, None)  # freed before the clock starts, for every candidate
            step.prepare()
            elapsed, last[name] = _measure(step, device)
            seconds[name].append(elapsed)
        on_round()
    return seconds, last


def ratios(seconds: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Time over the baseline's of the same round, pair by pair."""
    return [own / other for own, other in zip(seconds, baseline, strict=True)]


def _measure(step: Step, device: torch.device) -> tuple[float, Any]:
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            if not step.from_idle:
                _other_memory(device).zero_()
                torch.cuda._sleep(OTHER_CYCLES)
            start.record()
            result = step.run()
            end.record()
            torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, result
    begin = time.perf_counter_ns()
    result = step.run()
    return (time.perf_counter_ns() - begin) / 1e9, result


@functools.cache
def _other_memory(device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.empty(OTHER_BYTES, dtype=torch.uint8, device=device)

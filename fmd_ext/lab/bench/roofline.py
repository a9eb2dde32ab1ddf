"""What the device can do at best, measured, and how near to it a candidate comes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .timing import Step, interleave


@dataclasses.dataclass(frozen=True)
class Work:
    """The least that the work asks for: bytes to read and write, each once, and multiplications and additions."""

    bytes: float
    flops: float = 0.0

    def seconds(self, peaks: dict[str, float]) -> float:
        """The time that it takes at the measured peaks, whichever of the two binds."""
        return max(self.bytes / peaks["copy_bytes_per_s"], self.flops / peaks["matrix_flops_per_s"])


def measure_peaks(device: torch.device, dtype: torch.dtype, quick: bool) -> dict[str, float]:
    """Bandwidth of a large copy (bytes read plus written) and rate of a large matrix product in ``dtype``."""
    on_gpu = device.type == "cuda"
    num_bytes = 1 << (20 if quick else 32 if on_gpu else 28)
    side = 64 if quick else 8192 if on_gpu else 2048
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    steps = {"copy": Step(lambda: target.copy_(source)), "product": Step(lambda: left @ right)}
    interleave(steps, 2, device)  # warm-up
    seconds, _ = interleave(steps, 3 if quick else 10, device)
    return {
        "copy_bytes_per_s": 2 * num_bytes / min(seconds["copy"]),
        "matrix_flops_per_s": 2 * side**3 / min(seconds["product"]),
    }


def add_limits(case: dict[str, Any], work: Work | None, peaks: dict[str, float]) -> None:
    """Writes into a case's report the time at the peaks, and each candidate's part of that speed."""
    if work is None or "candidates" not in case:
        return
    case["work"], case["seconds_at_peak"] = dataclasses.asdict(work), work.seconds(peaks)
    for candidate in case["candidates"]:
        candidate["of_peak"] = case["seconds_at_peak"] / candidate["seconds"]["median"]

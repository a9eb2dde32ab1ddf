"""What ``fmd-ext doctor`` says of the ops: the code that each of them runs on each device here, why, and how exact."""

from __future__ import annotations

import os
from typing import Any

import torch

from fmd_ext.ops import dispatch, library, selftest
from fmd_ext.ops.registration import operators


def examine(problems: list[str]) -> list[dict[str, Any]]:
    """Every op on every device: the code that runs, why that one, and how far a small result is from plain PyTorch.

    What is wrong is added to ``problems``.
    """
    ops = []
    for device, paths in _paths().items():
        for name in operators():
            path, why, dtypes = paths[name]
            entry: dict[str, Any] = {"op": name, "device": device, "path": path, "why": why}
            if path is not None:
                entry["check"] = {}
            for dtype in dtypes:
                outcome = selftest.errors(torch.device(device), dtype)[name]
                shown = outcome if isinstance(outcome, str) else f"{outcome:.1e}"
                entry["check"][str(dtype).removeprefix("torch.")] = shown
                if problem := selftest.problem_of(name, dtype, outcome):
                    problems.append(f"on {device}, {problem}")
            ops.append(entry)
    return ops


def _paths() -> dict[str, dict[str, tuple[str | None, str, tuple[torch.dtype, ...]]]]:
    """By device and op: the code that runs (None: no such device), why, and the dtypes to try it with."""
    there = {"cpu": True, "cuda": torch.cuda.is_available()}
    there |= {"mps": torch.backends.mps.is_available(), "xpu": torch.xpu.is_available()}
    paths: dict[str, dict[str, tuple[str | None, str, tuple[torch.dtype, ...]]]] = {}
    for device, is_there in there.items():
        if not is_there:
            if device == "cuda":
                reason = library.load()["cuda"].reason or "torch sees no CUDA device"
                paths[device] = {name: (None, reason, ()) for name in operators()}
            continue
        paths[device] = {}
        for name, op in operators().items():
            dtypes = selftest.dtypes_of(name, device)
            here = torch.empty(0, device=device).device
            found = dispatch.find(here, dtypes[0], 64, op.attention)
            if found.name == "torch":
                path, why, dtypes = "torch's own operations", found.why, (torch.float32, torch.float16)
            else:
                path, why = _kernel(name, device, found.why)
            if name == "branched_prefill":
                prefill = dispatch.prefill_path(here, dtypes[0], 64)
                if prefill.name == "sdpa":
                    why += f"; a prompt given at once takes torch's causal attention instead: {prefill.why}"
            paths[device][name] = (path, why, dtypes)
    return paths


def _kernel(op: str, device: str, why: str) -> tuple[str, str]:
    """The kernel of an op that runs kernels, and why that one."""
    if device == "cuda":
        path, chosen = _cuda_kernel(op)
        reasons = [chosen, why]
        if op.startswith("branched_"):
            sizes = " and ".join(map(str, dispatch.CUDA_ATTENTION_HEAD_DIMS))
            reasons.append(f"float32, and head_dim other than {sizes}, run by torch's own operations")
        return path, "; ".join(filter(None, reasons))
    if op == "append_":
        return "csrc/cpu, plain copy", "it only moves bytes"
    asked = os.environ.get("FMD_EXT_CPU_ISA")
    if not asked or asked == "auto":
        asked = f"the best of {', '.join(library.cpu_isas())} that this CPU runs"
    else:
        asked = f"FMD_EXT_CPU_ISA={asked}"
    return f"csrc/cpu, {library.cpu_isa()}", "; ".join(filter(None, (asked, why)))


def _cuda_kernel(op: str) -> tuple[str, str]:
    """The CUDA kernel of an op on the current device, and where it and newer ones have passed."""
    kernels = [kernel for kernel in library.cuda_kernels() if kernel.op == op]
    name = library.cuda_kernel(op, torch.cuda.get_device_capability())
    return f"CUDA kernel {name}", in_words(kernels, name)


def in_words(kernels: list[library.CudaKernel], running: str | None) -> str:
    """Of the kernels of one op, oldest first: on which device the running one has passed, and what newer ones lack."""
    said = []
    for kernel in kernels[[kernel.name for kernel in kernels].index(running or "") :]:
        outcome = f"has passed on {kernel.passed_on}" if kernel.passed_on else "has not been run on a device"
        if kernel.name == running:
            said.append(f"its present source {outcome}")
        else:
            needs = f", for compute capability {kernel.capability / 10}," if kernel.capability else ""
            chosen = f"FMD_EXT_CUDA_KERNELS={kernel.op}={kernel.name} chooses it"
            said.append(f"the source of the newer {kernel.name}{needs} {outcome}: {chosen}")
    return "; ".join(said)


def line(op: dict[str, Any]) -> str:
    """What `examine` says of one op on one device, in words."""
    if op["path"] is None:
        return f"no implementation: {op['why']}"
    differences = ", ".join(f"{error} ({dtype})" for dtype, error in op["check"].items())
    return f"{op['path']}: {op['why']}; differs from plain PyTorch by {differences}"

"""Finds and loads the op libraries, which register the `fmd_ext` operators with torch.

`libfmd_ext_cpu.so` holds the schemas of all ops and their CPU kernels; `libfmd_ext_cuda.so`, where it was built, adds
CUDA kernels.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

# Of all ops' schemas together: kSchemaVersion in csrc/include/fmd/library.h.
SCHEMA_VERSION = 3
_FOLDER = Path(__file__).resolve().parents[1] / "lib"
# Written by the build where it could compile nothing: {"compiled": false, "reason": "..."}.
_BUILD_INFO = Path(__file__).resolve().parents[1] / "_build_info.json"
_ISA_VARIABLE = "FMD_EXT_CPU_ISA"
_KERNELS_VARIABLE = "FMD_EXT_CUDA_KERNELS"
_FORMER_VARIABLE = "FMD_EXT_CUDA_PREFILL"


@dataclass(frozen=True)
class Library:
    """One op library: `device` it is for, its `path`, and whether it is `loaded`, with the `reason` where it is not."""

    device: str
    path: Path
    loaded: bool
    reason: str = ""


@dataclass(frozen=True)
class CudaKernel:
    """One CUDA kernel of an op.

    Args:
        op, name: such as "branched_prefill" and "sm90".
        capability: the compute capability that it needs (9.0 is 90); 0 for every one from 8.0 on.
        sources: digest of the sources that it was built from.
        passed_on: the device on which these sources have passed their tests; "" for none.
    """

    op: str
    name: str
    capability: int
    sources: str
    passed_on: str


_libraries: dict[str, Library] = {}
_cpu: ctypes.CDLL | None = None
_cuda: ctypes.CDLL | None = None


def load() -> dict[str, Library]:
    """Loads the op libraries once and returns what became of each, by device ("cpu", "cuda").

    An installation without compiled code has none; see `why_not_compiled`.

    The environment variable `FMD_EXT_CPU_ISA` (auto, baseline, avx2, avx512) chooses the instruction set of the CPU
    kernels, `FMD_EXT_CUDA_KERNELS` CUDA kernels by op, as in "branched_prefill=sm90,append_=wide".

    Raises:
        ImportError: the CPU library is missing or does not load, the CUDA library is there and does not load, or one
            of them was built from other sources.
        ValueError: `FMD_EXT_CPU_ISA` is unknown or names an instruction set that this CPU lacks, or
            `FMD_EXT_CUDA_KERNELS` names an unknown op or kernel.
    """
    global _cpu, _cuda
    if _libraries:
        return dict(_libraries)
    if former := os.environ.get(_FORMER_VARIABLE):
        logger.warning(
            "fmd_ext: the environment variable %s=%s is not read any more; %s=branched_prefill=%s takes its place",
            *(_FORMER_VARIABLE, former, _KERNELS_VARIABLE, former),
        )
    if reason := why_not_compiled():
        for device in ("cpu", "cuda"):
            _libraries[device] = Library(device, _FOLDER / f"libfmd_ext_{device}.so", False, reason)
        return dict(_libraries)
    found = {"cpu": _load("cpu")}
    _cpu = _functions(found["cpu"].path, "fmd_ext_select_cpu_isa", "fmd_ext_cpu_isa", "fmd_ext_cpu_isas")
    _select_from(_ISA_VARIABLE, select_cpu_isa)

    cuda = _FOLDER / "libfmd_ext_cuda.so"
    if not cuda.exists():
        found["cuda"] = Library("cuda", cuda, False, "this installation was built without the CUDA op library")
    elif torch.version.cuda is None:
        found["cuda"] = Library("cuda", cuda, False, f"torch {torch.__version__} was built without CUDA")
    else:
        found["cuda"] = _load("cuda")
        _cuda = _cuda_functions(cuda)
        for choice in filter(None, (os.environ.get(_KERNELS_VARIABLE) or "").split(",")):
            try:
                select_cuda_kernel(*map(str.strip, choice.partition("=")[::2]))
            except ValueError as error:
                raise ValueError(f"environment variable {_KERNELS_VARIABLE}, {choice!r}: {error}") from None
    _libraries.update(found)
    return dict(_libraries)


def why_not_compiled() -> str:
    """Why this installation has no compiled code, as its build wrote down; "" for one that should have it.

    Raises:
        ImportError: what the build wrote down cannot be read.
    """
    if not _BUILD_INFO.exists():
        return ""
    try:
        info = json.loads(_BUILD_INFO.read_text())
        if info["compiled"]:
            return ""
        return f"this installation has no compiled code: {info['reason']}"
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ImportError(f"{_BUILD_INFO} is damaged ({error}): install fmd_ext again") from None


def _load(device: str) -> Library:
    path = _FOLDER / f"libfmd_ext_{device}.so"
    if not path.exists():
        raise ImportError(
            f"the op library {path} does not exist: fmd_ext is not built here. Install it with `pip install .` in the "
            "folder of its sources, or import it from where it is installed."
        )
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        raise ImportError(
            f"the op library {path} does not load into torch {torch.__version__} (2.10 or newer is needed): {error}"
        ) from error
    built = getattr(ctypes.CDLL(str(path)), "fmd_ext_schema_version", lambda: 1)()
    if built != SCHEMA_VERSION:
        raise other_sources(path, f"its op schemas are version {built}, this package has version {SCHEMA_VERSION}")
    return Library(device, path, True)


def other_sources(path: Path, what: str) -> ImportError:
    """The error for an op library that was not built from this package's sources."""
    return ImportError(
        f"{path} was built from other sources than this package ({what}): build it again, with `pip install .` in the "
        "folder of the sources"
    )


def _functions(path: Path, select: str, *getters: str) -> ctypes.CDLL:
    """The C functions of a loaded library: `select` takes a name and returns a reason or None, getters return text."""
    library = ctypes.CDLL(str(path))
    for name in (select, *getters):
        getattr(library, name).restype = ctypes.c_char_p
    getattr(library, select).argtypes = [ctypes.c_char_p]
    return library


def _cuda_functions(path: Path) -> ctypes.CDLL:
    library = _functions(path, "fmd_ext_select_cuda_kernel", "fmd_ext_cuda_kernel", "fmd_ext_cuda_kernels")
    library.fmd_ext_select_cuda_kernel.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    library.fmd_ext_cuda_kernel.argtypes = [ctypes.c_char_p, ctypes.c_int]
    return library


def _select_from(variable: str, select: Callable[[str], None]) -> None:
    try:
        select(os.environ.get(variable) or "auto")
    except ValueError as error:
        raise ValueError(f"environment variable {variable}: {error}") from None


def cpu_isa() -> str | None:
    """The instruction set that the CPU kernels use: "baseline", "avx2" or "avx512"; None without the CPU library."""
    load()
    return None if _cpu is None else _cpu.fmd_ext_cpu_isa().decode()


def cpu_isas() -> list[str]:
    """The instruction sets that this build holds and this CPU runs, best last."""
    load()
    return [] if _cpu is None else _cpu.fmd_ext_cpu_isas().decode().split()


def select_cpu_isa(name: str) -> None:
    """Makes the CPU kernels of this process use instruction set `name`, one of `cpu_isas()`, or the best ("auto").

    Raises:
        ValueError: unknown, not in this build, or not supported by this CPU.
        RuntimeError: the CPU library is not loaded.
    """
    if _cpu is None and not load()["cpu"].loaded:
        raise RuntimeError(f"there is no CPU kernel to choose: {load()['cpu'].reason}")
    assert _cpu is not None  # `load` has set it
    reason = _cpu.fmd_ext_select_cpu_isa(name.encode())
    if reason is not None:
        raise ValueError(reason.decode())


def cuda_kernels() -> list[CudaKernel]:
    """All CUDA kernels, those of one op from the oldest to the newest; none without the CUDA library."""
    load()
    if _cuda is None:
        return []
    lines = (line.split("\t") for line in _cuda.fmd_ext_cuda_kernels().decode().splitlines())
    return [CudaKernel(op, name, int(needs), sources, device) for op, name, needs, sources, device in lines]


def cuda_kernel(op: str, capability: tuple[int, int]) -> str | None:
    """The CUDA kernel that `op` runs on a device of a compute capability; None without the CUDA library."""
    load()
    return (
        None if _cuda is None else _cuda.fmd_ext_cuda_kernel(op.encode(), 10 * capability[0] + capability[1]).decode()
    )


def select_cuda_kernel(op: str, name: str) -> None:
    """Makes `op` of this process run a CUDA kernel by its name, or "auto": the newest that has passed its tests on a
    device and runs on the one at hand. A kernel that does not run on a device makes the op raise RuntimeError there.
    Not while another thread calls the op: the kernels need different amounts of memory.

    Raises:
        ValueError: unknown.
        RuntimeError: the CUDA library is not loaded.
    """
    if _cuda is None and not load()["cuda"].loaded:
        raise RuntimeError(f"there is no CUDA kernel to choose: {load()['cuda'].reason}")
    assert _cuda is not None  # `load` has set it
    reason = _cuda.fmd_ext_select_cuda_kernel(op.encode(), name.encode())
    if reason is not None:
        raise ValueError(reason.decode())

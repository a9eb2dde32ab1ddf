"""Which code runs an op: fmd_ext's kernels, or torch's own operations.

The kernels are for CPUs, and for CUDA devices of compute capability 8.0 and up; attention on CUDA takes bfloat16 and
float16 with `head_dim` 64 and 128. Everything else that torch has runs by torch's own operations: other dtypes and head
sizes, ROCm, MPS, XPU, and installations without compiled code. A warning says so once per reason.

`decide` is the whole rule, as a function of plain facts. `find` collects the facts and keeps the answer.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fmd_ext.ops import library

logger = logging.getLogger(__name__)

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_ATTENTION_DTYPES = (torch.bfloat16, torch.float16)
CUDA_ATTENTION_HEAD_DIMS = (64, 128)
LEAST_CAPABILITY = (8, 0)
# Where tests/csrc/test_cuda_device.py has passed. On other compute capabilities a check precedes the first use.
TESTED_CAPABILITIES = {(9, 0)}
# From here on cuDNN's causal attention is faster than the kernels: 1.5 to 1.9 times on an H200, from 2,000 rows on.
SDPA_CAPABILITY = (9, 0)


@dataclass(frozen=True)
class Path:
    """The code that runs: `name` is "kernel" or "torch", `why` the reason.

    `unchecked`: no test has run on a device like this, so the first use has to be preceded by a check.
    """

    name: str
    why: str
    unchecked: bool = False


@dataclass(frozen=True)
class Facts:
    """The facts from which `decide` chooses.

    Args:
        device: torch's type of the device ("cpu", "cuda", "mps", "xpu", ...).
        dtype: of the tensors.
        head_dim: of keys and values; None for ops without heads.
        attention: whether the op is attention.
        missing: why the op library for this device is not loaded; "" where it is.
        hip: torch's ROCm version, whose devices torch calls "cuda"; None for other builds of torch.
        capability: compute capability of a CUDA device, (0, 0) of others.
    """

    device: str
    dtype: torch.dtype
    head_dim: int | None = None
    attention: bool = True
    missing: str = ""
    hip: str | None = None
    capability: tuple[int, int] = (0, 0)


def decide(facts: Facts) -> Path:
    """Which code runs an op, and why."""
    if facts.device not in ("cpu", "cuda"):
        return Path("torch", f"fmd_ext has no kernels for {facts.device}")
    if facts.device == "cuda" and facts.hip:
        return Path("torch", f"fmd_ext has no kernels for ROCm ({facts.hip})")
    if facts.missing:
        return Path("torch", facts.missing)
    if facts.device == "cuda" and facts.capability < LEAST_CAPABILITY:
        least = _dotted(LEAST_CAPABILITY)
        return Path("torch", f"the kernels need compute capability {least}, this GPU has {_dotted(facts.capability)}")
    narrow = facts.device == "cuda" and facts.attention
    dtypes = CUDA_ATTENTION_DTYPES if narrow else KERNEL_DTYPES
    kernels = f"the {'attention ' if narrow else ''}kernels for {facts.device}"
    if facts.dtype not in dtypes:
        return Path("torch", f"{kernels} take {_listed(map(_name, dtypes))}, not {_name(facts.dtype)}")
    if narrow and facts.head_dim not in CUDA_ATTENTION_HEAD_DIMS:
        return Path("torch", f"{kernels} take head_dim {_listed(CUDA_ATTENTION_HEAD_DIMS)}, not {facts.head_dim}")
    if facts.head_dim is not None and facts.head_dim % 8:
        return Path("torch", f"{kernels} take a head_dim that is a multiple of 8, not {facts.head_dim}")
    if facts.device == "cuda" and facts.capability not in TESTED_CAPABILITIES:
        return Path(
            "kernel", f"checked here, since no test has run on compute capability {_dotted(facts.capability)}", True
        )
    return Path("kernel", "")


def find(device: torch.device, dtype: torch.dtype, head_dim: int | None = None, attention: bool = False) -> Path:
    """The path of an op on tensors like these. Warns once per reason where it is torch's."""
    key = (device, dtype, head_dim, attention)
    if key not in _found:
        _found[key] = _find(*key)
    return _found[key]


@torch.compiler.assume_constant_result
def runs_on_torch(
    device: torch.device, dtype: torch.dtype, head_dim: int | None = None, attention: bool = False
) -> bool:
    """Whether `find` gives torch's path. A compiled function keeps the answer that held when it was compiled."""
    path = _found.get((device, dtype, head_dim, attention))
    return (path or find(device, dtype, head_dim, attention)).name == "torch"


def of_decoder(decoder: nn.Module) -> Path:
    """The path of attention in a transformers decoder: of the device and dtype of its first floating-point weight."""
    weight = next(weight for weight in decoder.parameters() if weight.is_floating_point())
    config = decoder.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return find(weight.device, weight.dtype, head_dim, attention=True)


def prefill_path(device: torch.device, dtype: torch.dtype, head_dim: int) -> Path:
    """What attends in a prompt that is given at once: "op", which is `branched_prefill`, or "sdpa", torch's causal
    attention (`fmd_ext.engine.causal_runs`), and why."""
    key = (device, dtype, head_dim)
    if key not in _found_prefill:
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        path = decide_prefill(find(device, dtype, head_dim, attention=True), capability)
        if path.name == "sdpa" and _prefill.value == "auto" and (failure := _causal_problem(device, dtype, head_dim)):
            path = Path("op", failure)
            logger.warning("fmd_ext: on %s branched_prefill runs prompts given at once: %s", device.type, failure)
        _found_prefill[key] = path
    return _found_prefill[key]


def _causal_problem(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    from fmd_ext.ops import causal_attention

    return causal_attention.problem(device, dtype, head_dim)


def decide_prefill(path: Path, capability: tuple[int, int]) -> Path:
    """`prefill_path`, from what `find` gives for attention and the compute capability, (0, 0) of other devices."""
    if _prefill.value != "auto":
        return Path(_prefill.value, f"{_prefill.value} was chosen")
    if path.name == "torch":
        return Path("sdpa", "where torch's own operations run, causal attention without a mask is faster")
    if capability >= SDPA_CAPABILITY:
        return Path("sdpa", f"cuDNN is faster on compute capability {_dotted(capability)}")
    return Path("op", "")


_found: dict[tuple, Path] = {}
_found_prefill: dict[tuple, Path] = {}
_warned: set[str] = set()


class _Choice:
    """What the user chooses: at first by an environment variable.

    Args:
        what: its name in errors.
        variable: of the environment.
        accepted: the values; the first one holds where nothing is said.
    """

    def __init__(self, what: str, variable: str, *accepted: str) -> None:
        self.what = what
        self.accepted = accepted
        try:
            self.select(os.environ.get(variable) or accepted[0])
        except ValueError as error:
            raise ValueError(f"environment variable {variable}: {error}") from None

    def select(self, value: str) -> None:
        if value not in self.accepted:
            raise ValueError(f"unknown {self.what} {value!r}; accepted: {', '.join(self.accepted)}")
        self.value = value
        _found.clear()
        _found_prefill.clear()


_ops = _Choice("path of the ops", "FMD_EXT_OPS", "auto", "kernel", "torch")
_prefill = _Choice("path of prefills", "FMD_EXT_PREFILL", "auto", "op", "sdpa")
_split = _Choice("split of decoding", "FMD_EXT_DECODE_SPLIT", "auto", "fixed")


def select(name: str) -> None:
    """Makes the ops of this process take a path: "torch", "kernel" (or fail), or the one that `decide` gives ("auto").

    The environment variable `FMD_EXT_OPS` chooses when fmd_ext is imported.

    Raises:
        ValueError: unknown.
    """
    _ops.select(name)


@contextlib.contextmanager
def selected(name: str) -> Iterator[None]:
    """A context in which `select(name)` holds."""
    before = _ops.value
    select(name)
    try:
        yield
    finally:
        select(before)


def select_prefill(name: str) -> None:
    """Makes `prefill_path` give "op" or "sdpa", or what it finds to be faster ("auto").

    The environment variable `FMD_EXT_PREFILL` chooses when fmd_ext is imported.

    Raises:
        ValueError: unknown.
    """
    _prefill.select(name)


def select_split(name: str) -> None:
    """How `branched_decode` splits keys on CUDA: "fixed", so that a sample's result does not depend on what else is in
    the call, or "auto", which uses the device best. The environment variable `FMD_EXT_DECODE_SPLIT` chooses when
    fmd_ext is imported. A captured graph keeps the split that held when it was captured.

    Raises:
        ValueError: unknown.
    """
    _split.select(name)


def splits_are_fixed() -> bool:
    """Whether `select_split("fixed")` holds, or torch was asked for deterministic algorithms."""
    return _split.value == "fixed" or torch.are_deterministic_algorithms_enabled()


def _find(device: torch.device, dtype: torch.dtype, head_dim: int | None, attention: bool) -> Path:
    if _ops.value == "torch":
        return Path("torch", "torch's path was chosen")
    if _ops.value == "kernel":
        if reason := library.why_not_compiled():
            raise RuntimeError(f"the kernels were chosen for the ops, but {reason}")
        return Path("kernel", "the kernels were chosen")
    if device.type == "meta" or not dtype.is_floating_point:
        return Path("kernel", "")  # whose own check refuses it with a clear error
    path = decide(_facts(device, dtype, head_dim, attention))
    if path.unchecked and (failure := _check(device)):
        path = Path("torch", failure)
    if path.name == "torch" and path.why not in _warned:
        _warned.add(path.why)
        logger.warning(
            "fmd_ext: on %s torch's own operations run in the place of fmd_ext's kernels, exact but slower: %s",
            device.type,
            path.why,
        )
    return path


def _facts(device: torch.device, dtype: torch.dtype, head_dim: int | None, attention: bool) -> Facts:
    state = library.load().get(device.type)
    return Facts(
        device=device.type,
        dtype=dtype,
        head_dim=head_dim,
        attention=attention,
        missing=state.reason if state else "",
        hip=torch.version.hip,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0),
    )


@functools.cache
def _check(device: torch.device) -> str:
    """Runs every kernel once on a small input, some milliseconds. Returns what is wrong; "" where all is right."""
    from fmd_ext.ops import selftest

    with selected("kernel"):
        found = selftest.problems(device)
    return f"the check of the kernels failed on this GPU ({found[0]})" if found else ""


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _listed(values) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} and {last}" if others else last


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

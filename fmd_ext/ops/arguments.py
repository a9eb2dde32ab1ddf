"""Checks of op arguments on torch's path, with the messages of the kernels' own checks (`csrc/torch/checks.h`).

Any strides are accepted, and every floating-point dtype. Index values are checked where they can be read without
waiting for a device: on the CPU. Each check raises ValueError.
"""

from __future__ import annotations

import torch
from torch import Tensor

POOL_LAYOUT = "[num_kv_heads, num_slots, head_dim]"
# torch's C++ names of dtypes, which the kernels' messages use.
DTYPE_NAMES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
    torch.int64: "Long",
    torch.int32: "Int",
}


class Arguments:
    """The tensors of one call of `op`, by name; the first one decides about the device."""

    def __init__(self, op: str, **tensors: Tensor) -> None:
        self.op = op
        self.tensors = tensors

    def fail(self, name: str, what: str) -> None:
        gap = "" if what.startswith("[") else " "
        raise ValueError(f"fmd_ext::{self.op}: {name}{gap}{what}")

    def shape(self, name: str, layout: str, *sizes: int) -> None:
        """A size of -1 accepts any."""
        given = list(self.tensors[name].shape)
        if len(given) == len(sizes) and all(size in (-1, real) for size, real in zip(sizes, given, strict=True)):
            return
        accepted = ", ".join("any" if size == -1 else str(size) for size in sizes)
        self.fail(name, f"has shape {given}, accepted is {layout} = [{accepted}]")

    def dtype(self, name: str, dtype: torch.dtype) -> None:
        given = self.tensors[name].dtype
        if given != dtype:
            self.fail(name, f"has dtype {_name(given)}, accepted is {_name(dtype)}")

    def floating(self, name: str) -> None:
        given = self.tensors[name].dtype
        if not given.is_floating_point:
            self.fail(name, f"has dtype {_name(given)}, accepted are Float, BFloat16 and Half")

    def index_vector(self, name: str, layout: str, size: int) -> None:
        self.dtype(name, torch.int64)
        self.shape(name, layout, size)

    def one_device(self) -> None:
        first, *others = self.tensors
        accepted = self.tensors[first].device
        for name in others:
            if self.tensors[name].device != accepted:
                self.fail(name, f"is on {self.tensors[name].device}, accepted is {accepted} as for {first}")

    def rows(self, name: str, end: int, what: str, once: bool = False) -> None:
        """Values from 0 to end - 1, each at most once where `once`. Only of CPU tensors."""
        values = self.tensors[name]
        if values.device.type != "cpu":
            return
        seen = set()
        for i, value in enumerate(values.tolist()):
            if not 0 <= value < end:
                self.fail(name, f"[{i}] is {value}, accepted are 0 to {end - 1} ({what})")
            if once and value in seen:
                self.fail(name, f"[{i}] is {value}, which occurs twice")
            seen.add(value)


def _name(dtype: torch.dtype) -> str:
    return DTYPE_NAMES.get(dtype, str(dtype))

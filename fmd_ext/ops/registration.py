"""What every file of an op needs: `operator` makes the op of a function, `self_test` gives it a check.

An op has one file, which holds its signature, its description, its checks, torch's own operations for it, and its
self-test; `csrc/torch/` has a file of the same name with its schema and its kernels.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from fmd_ext import ops
from fmd_ext.ops import dispatch, library

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class Operator:
    """One op.

    Args:
        name: in `fmd_ext.ops` and in `torch.ops.fmd_ext`.
        attention: whether it is attention, whose kernels take fewer dtypes and head sizes.
        kernel: fmd_ext's kernels of all devices; torch's own operations in an installation without compiled code.
        on_torch: torch's own operations.
        self_test: see `fmd_ext.ops.selftest`.
    """

    name: str
    attention: bool
    kernel: Callable[..., Any]
    on_torch: Callable[..., Any]
    self_test: Callable[..., Any] | None = None


_operators: dict[str, Operator] = {}


def operators() -> dict[str, Operator]:
    """All ops by name, in the order of `fmd_ext.ops.FILES`."""
    for file in ops.FILES.values():
        importlib.import_module(f"fmd_ext.ops.{file}")
    return {name: _operators[name] for name in ops.FILES}


def operator(
    *,
    attention: bool = False,
    by_heads: bool = True,
    fake: Callable[..., Any] = lambda *arguments: None,
    found: dict[str, Callable[[], Any]] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes an op of a function whose body is the op by torch's own operations, checks of the arguments included.

    The op takes the arguments of the function, and refuses to be differentiated. It runs the kernel of
    `torch.ops.fmd_ext` of the same name, or the body, as `fmd_ext.ops.dispatch` decides from the first tensor.

    Args:
        attention: see `Operator`.
        by_heads: whether the last dimension of the first tensor is `head_dim`.
        fake: shapes and dtypes of the results without data, for torch.compile, torch.export and meta tensors. The
            default is that of an op that returns nothing.
        found: by name, what gives an argument's value in each call that leaves it None.

    Raises:
        ImportError: by the decorated function's import, if the op library lacks the op.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        signature = inspect.signature(function)
        first = next(iter(signature.parameters))
        # The schemas of the kernels have no defaults.
        defaults = tuple(p.default for p in signature.parameters.values() if p.default is not p.empty)
        num_required = len(signature.parameters) - len(defaults)
        to_find = [(list(signature.parameters).index(name), value) for name, value in (found or {}).items()]
        entry = Operator(name, attention, _kernel(name, function, fake), function)
        _operators[name] = entry

        @functools.wraps(function)
        def run(*arguments: Any, **named: Any) -> R:
            if named or not 0 <= len(arguments) - num_required <= len(defaults):
                bound = signature.bind(*arguments, **named)
                bound.apply_defaults()
                arguments = bound.args
            else:
                arguments += defaults[len(arguments) - num_required :]
            for index, value in to_find:
                if arguments[index] is None:
                    arguments = (*arguments[:index], value(), *arguments[index + 1 :])
            tensor = arguments[0]
            if not isinstance(tensor, Tensor):
                raise TypeError(f"fmd_ext::{name}: {first} is {tensor!r}, accepted is a tensor")
            if torch.is_grad_enabled():
                _refuse_gradients(name, *arguments)
            head_dim = tensor.shape[-1] if by_heads and tensor.dim() else None
            on_torch = dispatch.runs_on_torch(tensor.device, tensor.dtype, head_dim, attention)
            return (entry.on_torch if on_torch else entry.kernel)(*arguments)

        return cast(Callable[P, R], run)

    return register


def self_test(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function the self-test of an op: it takes `selftest.Inputs` and returns `selftest.Pairs`."""

    def register(check: Callable[P, R]) -> Callable[P, R]:
        _operators[name].self_test = check
        return check

    return register


def wide(x: Tensor) -> Tensor:
    """As float32, in which the ops compute; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def _kernel(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    cpu = library.load()["cpu"]
    if not cpu.loaded:  # an installation without compiled code
        return function
    try:
        kernel = getattr(torch.ops.fmd_ext, name).default
    except AttributeError as error:
        raise library.other_sources(cpu.path, str(error)) from None
    torch.library.register_fake(f"fmd_ext::{name}", fake)
    return refuse_by_value_error(kernel)


def refuse_by_value_error(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, whose refusal of an argument is a ValueError in every torch.

    torch 2.15 (not yet 2.13) makes a RuntimeError of whatever a library of the stable ABI throws. RuntimeErrors that
    are no refusals, such as CUDA's, stay what they are.
    """

    def run(*arguments):
        try:
            return kernel(*arguments)
        except RuntimeError as error:
            if not str(error).startswith("fmd_ext::"):
                raise
            raise ValueError(str(error)) from None

    return run


def _refuse_gradients(name: str, *arguments: Any) -> None:
    if any(isinstance(argument, Tensor) and argument.requires_grad for argument in arguments):
        raise RuntimeError(f"fmd_ext::{name} has no gradient: call it under torch.no_grad() or torch.inference_mode()")

"""torch.compile and our replacements: they run as Python; what lies between them is compiled.

Dynamo would trace planners, locks and a cache that changes its shape, and compile parts of each. Its marks are set
without importing it: the import takes seconds, and only compiled code needs it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._C._dynamo import eval_frame  # part of torch's own library: does not import Dynamo

_UNTRACED: list[Callable[..., Any]] = []


# What Dynamo would hand the next frame to; None: nothing is being compiled, frames run as they are. Seen in torch 2.11
# to 2.15; where it is missing, calls run untraced from Dynamo's import on.
_callback: Callable[[], Any] = getattr(eval_frame, "get_eval_frame_callback", lambda: False)


def as_python(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls ``function`` untraced. What it calls is not traced either, except for what is compiled by itself."""
    if "torch._dynamo" not in sys.modules:  # nothing can be compiled yet
        return function(*args, **kwargs)
    untraced_run = _untraced()  # marks our functions, before Dynamo looks at one of them
    if _callback() is None:
        return function(*args, **kwargs)
    return untraced_run(function, args, kwargs)


# Dynamo breaks its graph here, as at a function that torch.compiler.disable made.
as_python._torchdynamo_disable = True  # type: ignore[attr-defined]  # a mark on the function


def _apply(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def python_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator: the function runs `as_python`."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return as_python(function, *args, **kwargs)

    return untraced(run)


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator: once something has been compiled, Dynamo does not try to compile the frames of this function."""
    _UNTRACED.append(function)
    return function


@functools.cache
def _untraced() -> Callable[..., Any]:
    skip = getattr(torch._dynamo.decorators, "skip", None)  # seen in torch 2.13
    for function in (*_UNTRACED, as_python) if skip is not None else ():
        skip(function)
    return torch.compiler.disable(_apply, reason="fmd_ext runs as Python")


def is_called_by_compiled_code() -> bool:
    """Whether Dynamo would compile what is called next: the caller is, or is called by, a compiled module."""
    return "torch._dynamo" in sys.modules and _callback() not in (None, False)

"""A fingerprint of what a captured graph depends on: addresses of weights, and settings of modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

PLAIN = (bool, int, float, str, type(None))
LIBRARIES = ("fmd_ext.", "transformers.", "accelerate.")  # whose hooks do not stop a replay
OWN = set(nn.Module().__dict__)  # attributes of every module: those that matter are read by name


def fingerprint(*parts: nn.Module) -> int:
    """Changes when weights move or are replaced, modules come or go, or a plain setting of a module changes.

    A captured graph ignores such changes, so it may be replayed only while there are none: no adapter (LoRA) switched,
    merged or scaled, no model moved, no layer replaced. Weights may change in place: every replay reads them.
    """
    seen: list[tuple[Any, ...]] = []
    for module in (module for part in parts for module in part.modules()):
        seen.append((id(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks)))
        seen.extend((name, id(tensor), _address(tensor), tensor.dtype) for name, tensor in _tensors(module))
        seen.extend((n, _plain(v)) for n, v in module.__dict__.items() if n not in OWN and not n.startswith("_fmd"))
    return hash(tuple(seen))


def hooked(part: nn.Module) -> str:
    """The first module of ``part`` with a forward hook of the user's, which no replay would run; "" without any."""
    for name, module in part.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not (getattr(hook, "__module__", None) or "").startswith(LIBRARIES):
                return name or type(module).__name__
    return ""


def _tensors(module: nn.Module) -> Any:
    for group in (module._parameters, module._buffers):
        yield from ((name, tensor) for name, tensor in group.items() if tensor is not None)


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a wrapper around other tensors, such as a quantised weight
        return 0


def _plain(value: Any) -> Any:
    """What stands for an attribute: its value if plain, its identity for functions and configs, else None."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, PreTrainedConfig) or (callable(value) and not isinstance(value, nn.Module)):
        return id(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    if isinstance(value, dict):
        return tuple((str(key), _plain(item)) for key, item in value.items())
    return None

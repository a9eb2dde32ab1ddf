"""CUDA graphs for tests on the CPU: a step's operators are recorded once and replayed on the very same tensors.

As in a captured graph, a replay runs no Python: whatever the step took from Python numbers, or from tensors that were
replaced since, would be stale. What cannot be captured is an error here as well: reading a value back, shapes that
depend on data, new tensors from Python data.
"""

from __future__ import annotations

from unittest.mock import Mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FORBIDDEN = {
    "aten::_local_scalar_dense": "reads a value back",
    "aten::nonzero": "has a shape that depends on data",
    "aten::masked_select": "has a shape that depends on data",
    "aten::unique_dim": "has a shape that depends on data",
    "aten::lift_fresh": "makes a tensor from Python data",
    "aten::equal": "reads a value back",
}


def tensors_of(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def address(tensor):
    return tensor.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    """Within ``with recording:`` all operators run and are recorded; ``replay`` runs them again."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in FORBIDDEN:
            raise RuntimeError(f"{name} {FORBIDDEN[name]}, which no graph can capture")
        out = func(*args, **(kwargs or {}))
        if not self._is_view(func, args, kwargs, out):
            self.calls.append((func, args, kwargs or {}, tensors_of(out)))
        return out

    @staticmethod
    def _is_view(func, args, kwargs, out):
        """Nothing to do again: the result is its input's memory, which the operator does not write."""
        inputs = {address(tensor) for tensor in tensors_of((args, kwargs or {}))}
        return not func._schema.is_mutable and any(address(t) in inputs for t in tensors_of(out) if t.numel())

    def replay(self):
        with torch.inference_mode():  # writes to tensors that were recorded in that mode, too
            for func, args, kwargs, outputs in self.calls:
                again = tensors_of(func(*args, **kwargs))
                if not func._schema.is_mutable:
                    for own, new in zip(outputs, again, strict=True):
                        own.copy_(new)


def record_steps(monkeypatch):
    """Lets the decode runner capture its steps on the CPU. Returns the list that the recordings are appended to."""
    from fmd_ext.decode.step import CaptureSite, StaticStep

    recordings = []

    def record(self, cache, site):
        self._launch(cache)  # as on CUDA, where this one is not captured
        with Recording() as recording:
            self._launch(cache)
        recordings.append(recording)
        return recording

    monkeypatch.setattr(StaticStep, "has_graphs", staticmethod(lambda device: True))
    monkeypatch.setattr(StaticStep, "_record", record)
    monkeypatch.setattr(CaptureSite, "on", lambda device: Mock())
    return recordings

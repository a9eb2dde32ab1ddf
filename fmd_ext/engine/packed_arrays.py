"""Index arrays of a call that reach a device in one copy."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import torch


class PackedArrays:
    """int64 arrays of any shapes in one flat buffer, so that they reach a device in one copy.

    ``get`` gives views of the buffer on a device, which show what is changed in the buffer in place.
    """

    def __init__(self, **arrays: np.ndarray) -> None:
        self._places: dict[str, tuple[int, tuple[int, ...]]] = {}
        size = 0
        for name, array in arrays.items():
            self._places[name] = (size, array.shape)
            size += array.size
        self._hold(torch.from_numpy(np.concatenate([array.ravel() for array in arrays.values()])))

    def _hold(self, host: torch.Tensor) -> None:
        self.host = host
        self._buffers: dict[torch.device, torch.Tensor] = {}
        self._views: dict[tuple[str, torch.device], torch.Tensor] = {}

    def plus(self, growth: torch.Tensor, constant: Collection[str]) -> PackedArrays:
        """Arrays of the same shapes: ``growth``, laid out like ``host``, added. It is 0 in the arrays ``constant``,
        whose views both share."""
        grown = PackedArrays.__new__(PackedArrays)
        grown._places = self._places
        grown._hold(self.host + growth)
        grown._views |= {key: view for key, view in self._views.items() if key[0] in constant}
        return grown

    def get(self, name: str, device: torch.device) -> torch.Tensor:
        view = self._views.get((name, device))
        if view is None:
            if device not in self._buffers:
                self._buffers[device] = self.host.to(device, non_blocking=True)
            view = self._views[name, device] = self.view(name, self._buffers[device])
        return view

    def view(self, name: str, buffer: torch.Tensor) -> torch.Tensor:
        """The array ``name`` in a flat ``buffer`` laid out like this one."""
        start, shape = self._places[name]
        return buffer.narrow(0, start, math.prod(shape)).view(shape)

    def keep_on(self, device: torch.device) -> torch.Tensor:
        """The buffer on ``device``, a copy of its own that may be changed in place, call after call.

        For plans whose tensors outlive the call that they were made for; called before any ``get``.
        """
        with torch.inference_mode(False):  # else it could not be changed outside of inference mode
            self._buffers[device] = torch.empty(self.host.shape, dtype=torch.int64, device=device)
        return self._buffers[device].copy_(self.host)

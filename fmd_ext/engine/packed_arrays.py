"""Index arrays of a call that reach a device in one copy."""

from __future__ import annotations

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
        self.host = torch.from_numpy(np.concatenate([array.ravel() for array in arrays.values()]))
        self._buffers: dict[torch.device, torch.Tensor] = {}
        self._views: dict[tuple[str, torch.device], torch.Tensor] = {}

    def get(self, name: str, device: torch.device) -> torch.Tensor:
        key = (name, device)
        if key not in self._views:
            if device not in self._buffers:
                self._buffers[device] = self.host.to(device, non_blocking=True)
            self._views[key] = self.view(name, self._buffers[device])
        return self._views[key]

    def view(self, name: str, buffer: torch.Tensor) -> torch.Tensor:
        """The array ``name`` in a flat ``buffer`` laid out like this one."""
        start, shape = self._places[name]
        return buffer[start : start + int(np.prod(shape))].view(shape)

    def keep_on(self, device: torch.device) -> torch.Tensor:
        """The buffer on ``device``, a copy of its own that may be changed in place, call after call.

        For plans whose tensors outlive the call that they were made for; called before any ``get``.
        """
        with torch.inference_mode(False):  # else it could not be changed outside of inference mode
            self._buffers[device] = torch.empty(self.host.shape, dtype=torch.int64, device=device)
        return self._buffers[device].copy_(self.host)

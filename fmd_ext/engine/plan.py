"""What one forward call does with its rows: made once per call by the planner, then frozen, read by every layer."""

from __future__ import annotations

import dataclasses

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


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """Which keys each row sees, and where its own key goes, in one kind of layer (before or after the merge).

    Tensors: ``qo_rows`` [rows in groups], ``cu_seqlens_q`` [groups + 1], ``key_ranges`` [groups, 4] (kv_start, kv_len,
    prefix_start, prefix_len) and ``slots`` [rows], all int64; see ``csrc/include/fmd/branched_attention.h``.

    Args:
        kind: ``"fork"`` (before the merge) or ``"trunk"``; the prefix of the tensors' names in ``arrays``.
        max_qo_len: rows of the longest group.
        arrays: those of the whole plan.
    """

    kind: str
    max_qo_len: int
    arrays: PackedArrays

    def get(self, name: str, device: torch.device) -> torch.Tensor:
        return self.arrays.get(f"{self.kind}.{name}", device)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The rows of one forward call over a padded batch [batch, length].

    Args:
        batch, length: shape of the padded batch.
        num_home: rows that hold every valid position once, in batch order.
        positions: [rows] int64, row -> sample * length + position; away rows follow the home rows.
        home_rows: [away rows] int64, the home row that away row ``num_home + j`` merges into.
        away_modality: [away rows] int64, label of that position (0 text, 1 visual, 2 audio, 3 joint).
        forked: [batch] bool, samples that are in the fork after this call.
        begins: [batch] bool, those of them that were not before.
        tensors: ``positions``, ``home_rows``, ``away_rows`` and ``away_modality``, and the tensors of ``fork`` and
            ``trunk``.
        fork, trunk: attention before and after the merge.
    """

    batch: int
    length: int
    num_home: int
    positions: np.ndarray
    home_rows: np.ndarray
    away_modality: np.ndarray
    forked: np.ndarray
    begins: np.ndarray
    tensors: PackedArrays
    fork: LayerPlan
    trunk: LayerPlan

    @property
    def num_rows(self) -> int:
        return len(self.positions)

    @property
    def num_away(self) -> int:
        return len(self.home_rows)

    @property
    def is_dense(self) -> bool:
        """No padding: the home rows are the padded batch itself."""
        return self.num_home == self.batch * self.length

    @property
    def has_masked_rows(self) -> bool:
        """Some away row is a masked audio-visual position, not text."""
        return bool(self.away_modality.any())

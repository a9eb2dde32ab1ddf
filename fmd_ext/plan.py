"""What one forward call does with its rows: made once per call by the planner, read by every layer."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np
import torch

from .auto import Reading


class DeviceTensors:
    """int64 numpy arrays as tensors, one copy per device, made when first asked for."""

    def __init__(self, **arrays: np.ndarray) -> None:
        self._host = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self._copies: dict[tuple[str, torch.device], torch.Tensor] = {}

    def get(self, name: str, device: torch.device) -> torch.Tensor:
        tensor = self._host[name]
        if device.type == "cpu":
            return tensor
        key = (name, device)
        if key not in self._copies:
            self._copies[key] = tensor.to(device, non_blocking=True)
        return self._copies[key]


class AttentionStep(DeviceTensors):
    """Which keys each row sees, and where its own key goes, in one kind of layer (before or after the merge).

    Tensors: ``qo_rows`` [rows in groups], ``cu_seqlens_q`` [groups + 1], ``segments`` [groups, 4] (kv_start, kv_len,
    prefix_start, prefix_len) and ``slots`` [rows], all int64; see ``csrc/include/fmd/params.h``.
    """

    def __init__(self, max_qo_len: int, **arrays: np.ndarray) -> None:
        super().__init__(**arrays)
        self.max_qo_len = max_qo_len


@dataclasses.dataclass
class StepPlan:
    """The rows of one forward call over a padded batch [batch, length].

    Args:
        batch, length: shape of the padded batch.
        num_home: rows that hold every valid position once, in batch order.
        positions: [rows] int64, row -> sample * length + position; away rows follow the home rows.
        home_rows: [away rows] int64, the home row that away row ``num_home + j`` merges into.
        away_modality: [away rows] int64, label of that position (0 text, 1 visual, 2 audio, 3 joint).
        fork, trunk: attention before and after the merge.
        fork_layers: number of layers before the merge. While ``chooses_depth``, the largest that it may become.
        forked: [batch] bool, samples that are in the fork after this call.
        chooses_depth: whether ``reading`` decides on ``fork_layers`` during the call.
        reading: what the samples that begin to fork attend to, where a setting is "auto"; else None.
        home_weights: float32 [batch, 4], home row weights of the merge by sample and label, where they differ between
            samples; else None.
    """

    batch: int
    length: int
    num_home: int
    positions: np.ndarray
    home_rows: np.ndarray
    away_modality: np.ndarray
    fork: AttentionStep
    trunk: AttentionStep
    fork_layers: int
    forked: np.ndarray
    chooses_depth: bool = False
    reading: Reading | None = None
    home_weights: torch.Tensor | None = None

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

    @cached_property
    def tensors(self) -> DeviceTensors:
        away_rows = np.arange(self.num_home, self.num_rows)
        return DeviceTensors(
            positions=self.positions,
            home_rows=self.home_rows,
            away_rows=away_rows,
            away_modality=self.away_modality,
        )

    def attention_for(self, layer_idx: int) -> AttentionStep:
        return self.fork if layer_idx < self.fork_layers else self.trunk

"""What one forward call does with its rows: made once per call by the planner, then frozen, read by every layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import NamedTuple

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


class TextStep(NamedTuple):
    """A call that has added one text position to every sample. The plan of a next one follows from its plan.

    Args:
        plan: of the call.
        growth: what one more position adds to the plan's numbers; see `growth_of`.
        room: text positions that fit into every segment behind it.
    """

    plan: Plan
    growth: torch.Tensor
    room: int

    def plan_of_next(self) -> Plan:
        """The plan of one text position more in every sample, as the planner would make it."""
        plan = self.plan
        tensors = plan.tensors.plus(self.growth, CONSTANT)
        fork, trunk = (dataclasses.replace(part, arrays=tensors) for part in (plan.fork, plan.trunk))
        return dataclasses.replace(plan, tensors=tensors, fork=fork, trunk=trunk)

    def followed_by(self, plan: Plan) -> TextStep:
        """The step whose ``plan`` `plan_of_next` has given."""
        return TextStep(plan, self.growth, self.room - 1)


# Arrays of a plan that are the same in the next text step.
CONSTANT = frozenset(
    ("positions", "home_rows", "away_rows", "away_modality")
    + tuple(f"{kind}.{name}" for kind in ("fork", "trunk") for name in ("qo_rows", "cu_seqlens_q"))
)


def growth_of(plan: Plan) -> torch.Tensor:
    """What a text position more adds to the buffer of ``plan.tensors``, where the plan adds one to every sample: a key
    in the segment of every row, appended one slot further."""
    growth = torch.zeros_like(plan.tensors.host)
    for kind in ("fork", "trunk"):
        plan.tensors.view(f"{kind}.slots", growth).fill_(1)
        plan.tensors.view(f"{kind}.key_ranges", growth)[:, 1] = 1
    return growth

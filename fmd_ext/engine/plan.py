"""What one forward call does with its rows: made once per call by the planner, then frozen, read by every layer."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
import torch

from fmd_ext.engine.causal_runs import CausalRuns
from fmd_ext.engine.packed_arrays import PackedArrays


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

    @functools.cached_property
    def causal_runs(self) -> CausalRuns | None:
        """The same attention as squares of causal attention; None where it is not that."""
        names = ("qo_rows", "cu_seqlens_q", "key_ranges", "slots")
        host = (self.arrays.view(f"{self.kind}.{name}", self.arrays.host).numpy() for name in names)
        qo_rows, cu_seqlens_q, key_ranges, slots = host
        return CausalRuns.of(qo_rows, cu_seqlens_q, key_ranges, len(slots))


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

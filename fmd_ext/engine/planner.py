"""The planner for installations without compiled code: `fmd_ext._core.make_plan` in Python, with the same results.

`make_plan` here is the compiled one wherever there is one. The rules are those of `csrc/include/fmd/plan.h`.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from fmd_ext.ops import library

PADDING, TEXT, VISUAL, AUDIO, JOINT = -1, 0, 1, 2, 3
UNFORKED, PREFIX_OPEN, FORKED = 0, 1, 2
NUM_SEGMENTS = 3  # prefix, visual branch, audio branch


@dataclasses.dataclass(frozen=True)
class RowGroups:
    """The rows and query groups of one attention call; int64 arrays.

    Args:
        qo_rows: [rows], group by group, in causal order.
        cu_seqlens_q: [groups + 1], where each group begins in ``qo_rows``.
        group_segment: [groups], sample * 3 + segment in the fork layers, the sample in the layers after the merge.
        row_segment: [rows], the segment that the row's key is appended to.
        row_offset: [rows], its place in that segment.
        max_qo_len: rows of the largest group.
    """

    qo_rows: np.ndarray
    cu_seqlens_q: np.ndarray
    group_segment: np.ndarray
    row_segment: np.ndarray
    row_offset: np.ndarray
    max_qo_len: int

    @classmethod
    def of(cls, positions: np.ndarray, row_segment: np.ndarray, start: np.ndarray) -> RowGroups:
        """Rows at ``positions`` [rows] in ``row_segment`` [rows]; segments hold ``start`` [segments] keys already."""
        order = np.lexsort((positions, row_segment))
        segment, first, count = np.unique(row_segment[order], return_index=True, return_counts=True)
        row_offset = np.empty_like(row_segment)
        row_offset[order] = start[row_segment[order]] + np.arange(len(order)) - np.repeat(first, count)
        bounds = np.concatenate([[0], np.cumsum(count)]).astype(np.int64)
        return cls(order, bounds, segment, row_segment, row_offset, int(count.max(initial=0)))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one forward call computes.

    Args:
        num_home: home rows are rows 0 .. num_home - 1, away rows follow.
        positions: int64 [rows], index into the labels: sample * length + position.
        home_rows: int64 [away rows], the home row that away row ``num_home + j`` merges into.
        away_modality: int64 [away rows], 0 text, 1 visual, 2 audio, 3 joint.
        fork, trunk: RowGroups of the layers before and after the merge.
        seg_len: int64 [batch, 3], keys per segment after this call.
        phase: int8 [batch], phases after this call.
    """

    num_home: int
    positions: np.ndarray
    home_rows: np.ndarray
    away_modality: np.ndarray
    fork: RowGroups
    trunk: RowGroups
    seg_len: np.ndarray
    phase: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.positions)


def make_plan_in_python(
    labels: np.ndarray, seg_len: np.ndarray, trunk_len: np.ndarray, phase: np.ndarray, masking: str
) -> Plan:
    """Plans one forward call of a padded batch; arguments and errors of `fmd_ext._core.make_plan`."""
    _check(labels, seg_len, trunk_len, phase, masking)
    batch, length = labels.shape
    # A sample whose prefix is open forks at its first visual, audio or joint position.
    opened = np.logical_or.accumulate(labels > TEXT, axis=1)
    forked = np.where((phase == PREFIX_OPEN)[:, None], opened, (phase == FORKED)[:, None])
    home_segment = np.where(forked, np.where(labels == AUDIO, 2, 1), 0)
    has_away = forked & ((labels == TEXT) | ((masking == "zero") & (labels != PADDING)))

    home_of = np.cumsum((labels != PADDING).ravel()) - 1  # position -> home row
    homes, aways = np.flatnonzero(labels != PADDING), np.flatnonzero(has_away)
    positions = np.concatenate([homes, aways])
    first_segment = positions // max(length, 1) * NUM_SEGMENTS
    segment = home_segment.ravel()
    in_sample = np.concatenate([segment[homes], NUM_SEGMENTS - segment[aways]])
    fork = RowGroups.of(positions, first_segment + in_sample, seg_len.ravel())
    new_keys = np.bincount(fork.row_segment, minlength=seg_len.size)
    return Plan(
        num_home=len(homes),
        positions=positions,
        home_rows=home_of[aways],
        away_modality=labels.ravel()[aways].astype(np.int64),
        fork=fork,
        trunk=RowGroups.of(homes, homes // max(length, 1), trunk_len),
        seg_len=seg_len + new_keys.reshape(batch, NUM_SEGMENTS),
        phase=np.where((phase == PREFIX_OPEN) & opened.any(axis=1), FORKED, phase).astype(np.int8),
    )


def _check(labels, seg_len, trunk_len, phase, masking) -> None:
    """Raises ValueError as the compiled planner does."""
    _has("labels", labels, np.int8, "[batch, length]", (-1, -1))
    batch = len(labels)
    _has("seg_len", seg_len, np.int64, f"[{batch}, 3]", (batch, NUM_SEGMENTS))
    _has("trunk_len", trunk_len, np.int64, f"[{batch}]", (batch,))
    _has("phase", phase, np.int8, f"[{batch}]", (batch,))
    if masking not in ("zero", "attention"):
        raise ValueError(f"masking is '{masking}', accepted is 'zero' or 'attention'")
    phases = "a phase is 0 (unforked), 1 (prefix open) or 2 (forked)"
    _refuse("phase", phase, (phase < UNFORKED) | (phase > FORKED), phases)
    for name, lengths in (("seg_len", seg_len), ("trunk_len", trunk_len)):
        _refuse(name, lengths, lengths < 0, "a length is at least 0")
    kinds = "a label is -1 (padding), 0 (text), 1 (visual), 2 (audio) or 3 (joint)"
    _refuse("labels", labels, (labels < PADDING) | (labels > JOINT), kinds)
    if masking == "attention":
        why = (
            "a joint position mixes both modalities, so masking='attention' has no position to leave out of a branch; "
            "accepted with joint positions is masking='zero'"
        )
        _refuse("labels", labels, labels == JOINT, why)


def _has(name: str, array: np.ndarray, dtype: type, layout: str, shape: tuple[int, ...]) -> None:
    fits = array.ndim == len(shape) and all(n in (-1, m) for n, m in zip(shape, array.shape, strict=True))
    if array.dtype != dtype or not fits:
        given = f"{array.dtype} [{', '.join(map(str, array.shape))}]"
        raise ValueError(f"{name} is {given}, accepted is {np.dtype(dtype)} {layout}")


def _refuse(name: str, array: np.ndarray, wrong: np.ndarray, why: str) -> None:
    if wrong.any():
        place = tuple(map(int, np.argwhere(wrong)[0]))
        raise ValueError(f"{name}[{', '.join(map(str, place))}] is {array[place]}; {why}")


if library.why_not_compiled():
    make_plan = make_plan_in_python
else:
    from fmd_ext._core import make_plan as make_plan_compiled

    make_plan = make_plan_compiled

"""A prompt that is given at once, by torch's causal attention instead of `branched_prefill`.

Where a group's queries are as many as its own keys, they and the rows of its prefix are one square of plain causal
attention: a *run*. Layers after the merge have a run per sample, fork layers one per branch, which computes the rows of
the prefix again. So whatever attention torch has for this device serves, cuDNN's too. Calls of other forms (chunks,
later turns, long prefixes) stay with the op; `fmd_ext.ops.dispatch.prefill_path` chooses.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fmd_ext.engine.packed_arrays import PackedArrays
from fmd_ext.ops.causal_attention import causal_attention

# Runs may have so many times the query-key pairs of their groups: they compute the prefix once per branch, and padding.
MOST_PAIRS = 1.4
# Of a run, on CUDA: shorter ones have not been measured.
LEAST_ROWS_ON_CUDA = 1024


class _Group(NamedTuple):
    """Queries ``rows`` and the two ranges of slots that they see; see `fmd_ext.ops.branched_prefill`."""

    rows: np.ndarray
    kv_start: int
    kv_len: int
    prefix_start: int
    prefix_len: int


class Run(NamedTuple):
    """One square of causal attention.

    Args:
        rows, slots: int64 [size], of the queries and of their keys in the pools.
        num_skipped: queries at the beginning whose results another run gives.
    """

    rows: np.ndarray
    slots: np.ndarray
    num_skipped: int


class _Batch(NamedTuple):
    """Runs of one padded size, one call of attention.

    Args:
        shape: runs, padded size.
        arrays: ``rows`` and ``slots`` [runs * size] to gather; ``results`` and ``targets``, the rows of the runs that
            count, and where they belong.
        is_plain: the rows of q and of the result need no gathering.
        first_slot: where the keys lie one after the other and need none; else None.
    """

    shape: tuple[int, int]
    arrays: PackedArrays
    is_plain: bool
    first_slot: int | None


class CausalRuns:
    """Attention of one kind of layer, as runs. Made by `of`."""

    def __init__(self, runs: list[Run], num_rows: int) -> None:
        self.runs = runs
        self.num_rows = num_rows
        self._batches: dict[bool, list[_Batch]] = {}

    @classmethod
    def of(
        cls, qo_rows: np.ndarray, cu_seqlens_q: np.ndarray, key_ranges: np.ndarray, num_rows: int
    ) -> CausalRuns | None:
        """The runs of an attention call; arguments as of `fmd_ext.ops.branched_prefill`, on the host.

        None: some row has no group, some group does not see all of its own keys' rows, or the runs cost too much.
        """
        rows_of = [qo_rows[begin:end] for begin, end in zip(cu_seqlens_q, cu_seqlens_q[1:], strict=False)]
        given = [_Group(rows, *ranges) for rows, ranges in zip(rows_of, key_ranges.tolist(), strict=True)]
        groups = [group for group in given if len(group.rows)]
        if not groups or sum(len(group.rows) for group in groups) != num_rows:
            return None
        whole = {(g.kv_start, g.kv_len): g.rows for g in groups if not g.prefix_len and g.kv_len == len(g.rows)}
        runs: list[Run] = []
        joined = set()  # prefixes whose rows some run computes and gives
        for group in groups:
            prefix = group.prefix_start, group.prefix_len
            if group.kv_len != len(group.rows) or (group.prefix_len and prefix not in whole):
                return None
            rows, slots, num_skipped = group.rows, np.arange(group.kv_start, group.kv_start + group.kv_len), 0
            if group.prefix_len:
                rows = np.concatenate([whole[prefix], rows])
                slots = np.concatenate([np.arange(group.prefix_start, group.prefix_start + group.prefix_len), slots])
                num_skipped = group.prefix_len if prefix in joined else 0
                joined.add(prefix)
            runs.append(Run(rows, slots, num_skipped))
        alone = [run for run in runs if (int(run.slots[0]), len(run.slots)) not in joined]
        pairs = sum(len(g.rows) * (2 * (g.prefix_len + g.kv_len) - len(g.rows) + 1) for g in groups)
        if sum(len(run.rows) * (len(run.rows) + 1) for run in alone) > MOST_PAIRS * pairs:
            return None
        return cls(alone, num_rows)

    def serves(self, device: torch.device) -> bool:
        return device.type != "cuda" or min(len(run.rows) for run in self.runs) >= LEAST_ROWS_ON_CUDA

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """What ``branched_prefill(...)[0]`` gives, up to rounding.

        Args:
            q: [rows, num_qo_heads, head_dim].
            k, v: pools [num_kv_heads, num_slots, head_dim].

        Returns:
            [rows, num_qo_heads, head_dim].
        """
        batches = self._arranged(pads(q.device))
        if batches[0].is_plain:
            return _attend(batches[0], q, k, v, scale)[: self.num_rows]
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for batch in batches:
            results, targets = (batch.arrays.get(name, q.device) for name in ("results", "targets"))
            out.index_copy_(0, targets, _attend(batch, q, k, v, scale).index_select(0, results))
        return out

    def _arranged(self, is_padded: bool) -> list[_Batch]:
        if is_padded not in self._batches:
            by_size = defaultdict(list)
            for run in self.runs:
                by_size[padded_size(len(run.rows)) if is_padded else len(run.rows)].append(run)
            self._batches[is_padded] = [_batch(runs, size, self.num_rows) for size, runs in by_size.items()]
        return self._batches[is_padded]


def pads(device: torch.device) -> bool:
    """Whether runs are padded: on CUDA, where cuDNN makes a plan for each new size."""
    return device.type == "cuda"


def padded_size(size: int) -> int:
    """A size from ``size`` on, at most a sixteenth larger or 64; a power of two has few of them, so few plans are made.

    Making one takes longer than an attention call. No row sees what is behind it: padding changes no result.
    """
    step = max(64, (1 << (size - 1).bit_length()) // 32)
    return -(-size // step) * step


def _batch(runs: list[Run], size: int, num_rows: int) -> _Batch:
    def behind(index: np.ndarray) -> np.ndarray:
        return np.concatenate([index, np.repeat(index[-1:], size - len(index))])  # finite values, as padding must be

    rows = np.concatenate([behind(run.rows) for run in runs])
    results = [
        np.arange(number * size + run.num_skipped, number * size + len(run.rows)) for number, run in enumerate(runs)
    ]
    targets = np.concatenate([run.rows[run.num_skipped :] for run in runs])
    # The rows are those of q in order, but for padding behind the last of them.
    is_plain = all(np.array_equal(own, np.arange(num_rows)) for own in (targets, np.concatenate(results)))
    slots = np.concatenate([behind(run.slots) for run in runs])
    arrays = PackedArrays(rows=rows, slots=slots, results=np.concatenate(results), targets=targets)
    is_one = len(slots) == size and np.array_equal(slots, np.arange(slots[0], slots[0] + size))
    return _Batch((len(runs), size), arrays, is_plain, int(slots[0]) if is_one else None)


def _attend(batch: _Batch, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[runs * size, num_qo_heads, head_dim], padding included."""
    rows, slots = (batch.arrays.get(name, q.device) for name in ("rows", "slots"))
    queries = q if batch.is_plain and len(rows) == len(q) else q.index_select(0, rows)
    queries = queries.unflatten(0, batch.shape).transpose(1, 2)
    if batch.first_slot is not None:
        keys, values = (pool.narrow(1, batch.first_slot, len(slots))[None] for pool in (k, v))
    else:
        keys, values = (pool.index_select(1, slots).unflatten(1, batch.shape).transpose(0, 1) for pool in (k, v))
    return causal_attention(queries, keys, values, scale).transpose(1, 2).flatten(0, 1)

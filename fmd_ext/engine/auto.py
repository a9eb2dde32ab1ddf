"""Settings that a prompt chooses for itself, from the attention of its last token in the fork: alpha="auto" and
fork_layers="auto". docs/calibration.md defines and justifies both; they are ours, not the paper's.

The last token has a row in each branch. Its attention there, summed over the keys of a modality and averaged over the
heads, is the share S[branch, modality]; one such row per branch and layer is all that is computed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fmd_ext import ops
from fmd_ext.config import AUTO, FMDConfig
from fmd_ext.engine.call import Call
from fmd_ext.engine.packed_arrays import PackedArrays
from fmd_ext.engine.plan import Plan
from fmd_ext.labels import AUDIO, JOINT, VISUAL

# Labels of the keys that count as visual and as audio.
MODALITIES = ((VISUAL, JOINT), (AUDIO, JOINT))
# A sample stops forking after the layer in which it reads its modalities less than this part of the most so far.
READING_FADES = 0.5


def largest_depth(num_layers: int) -> int:
    """The deepest fork that ``fork_layers="auto"`` chooses."""
    return max(1, num_layers // 2)


def default_depth(num_layers: int) -> int:
    """The package's default, which "auto" falls back to where nothing forks in the first call on a cache."""
    return max(1, num_layers // 4)


class OpenCall:
    """Creates the `Call` of a forward call where a setting is "auto"; see `Session`."""

    def __init__(self, config: FMDConfig, num_layers: int) -> None:
        self.config = config
        self.num_layers = num_layers

    def __call__(self, plan: Plan, labels: np.ndarray, state: Any) -> Call:
        """The call. A depth that was chosen for a cache holds for all later calls on it (``state.fork_layers``)."""
        begins = bool(plan.begins.any())
        fork_layers, chooses_depth = state.fork_layers, False
        if fork_layers is None:
            chooses_depth = begins
            fork_layers = largest_depth(self.num_layers) if begins else default_depth(self.num_layers)
        chooses_alpha = begins and self.config.alpha == AUTO and self.config.masking == "zero"
        observer = Reading(labels, plan, chooses_depth, chooses_alpha) if chooses_depth or chooses_alpha else None
        return Call(plan, fork_layers, state.home_weights, observer)


class Reading:
    """The last rows of the samples that begin to fork in a call, and how they share their attention.

    It is the `Observer` of their call.

    Args:
        labels: int8 [batch, length] of the call.
        plan: of the call.
        chooses_depth, chooses_alpha: which settings it chooses.

    Attributes:
        samples: [batch] bool, those that begin to fork in this call.
    """

    def __init__(self, labels: np.ndarray, plan: Plan, chooses_depth: bool, chooses_alpha: bool) -> None:
        self.samples = samples = plan.begins
        self.chooses_depth = chooses_depth
        self.chooses_alpha = chooses_alpha
        positions, home_rows, host = plan.positions, plan.home_rows, torch.device("cpu")
        qo_rows, cu_seqlens_q, key_ranges, slots = (
            plan.fork.get(name, host).numpy() for name in ("qo_rows", "cu_seqlens_q", "key_ranges", "slots")
        )
        num_home, length = plan.num_home, labels.shape[1]
        label_of_row = labels.ravel()[positions]
        place_of_row = np.empty(len(positions), np.int64)
        place_of_row[qo_rows] = np.arange(len(qo_rows))
        rows, places = [], []  # read rows, and sample * 2 + branch of each
        for sample in np.flatnonzero(samples):
            own = np.flatnonzero(positions[:num_home] // length == sample)
            home = int(own[-1])  # rows are in the order of the positions
            away = num_home + np.flatnonzero(home_rows == home)
            home_branch = 1 if label_of_row[home] == AUDIO else 0
            rows += [home, *away]
            places += [2 * sample + home_branch] + [2 * sample + 1 - home_branch] * len(away)
        groups = np.searchsorted(cu_seqlens_q, place_of_row[rows], side="right") - 1
        self._arrays = PackedArrays(
            rows=np.array(rows),
            order=np.arange(len(rows)),
            places=np.array(places),
            key_ranges=key_ranges[groups],
            **{f"slots_{i}": slots[np.isin(label_of_row, own)] for i, own in enumerate(MODALITIES)},
        )
        self._indicators: dict[tuple, torch.Tensor] = {}
        self._read: list[torch.Tensor] = []  # by layer, [read rows, num_qo_heads, 2]

    def observe(self, rows: torch.Tensor, pool: torch.Tensor, scale: float) -> None:
        """One forked layer: queries [rows, num_qo_heads, head_dim] and the pool [num_kv_heads, num_slots, head_dim].

        The share of a modality is attention over values that are 1 at its keys and 0 elsewhere.
        """
        device = rows.device
        own, order, key_ranges = (self._arrays.get(name, device) for name in ("rows", "order", "key_ranges"))
        values = self._indicator(pool).expand(len(pool), -1, -1)
        out, _ = ops.branched_decode(rows.index_select(0, own), pool, values, order, key_ranges, scale)
        self._read.append(out[..., : len(MODALITIES)])

    def _indicator(self, pool: torch.Tensor) -> torch.Tensor:
        """[num_slots, head_dim] in the dtype of ``pool``: column i is 1 where a key is of modality i."""
        shape, device = pool.shape[1:], pool.device
        key = (shape, pool.dtype, device)
        if key not in self._indicators:
            self._indicators[key] = found = pool.new_zeros(shape)
            for column in range(len(MODALITIES)):
                found[:, column].index_fill_(0, self._arrays.get(f"slots_{column}", device), 1)
        return self._indicators[key]

    @property
    def layers(self) -> torch.Tensor:
        """Shares of each layer that has been read, float32 [layers, batch, 2, 2] (branch, modality)."""
        device = self._read[0].device
        read = torch.stack([out.to(device) for out in self._read]).float().mean(2)
        shares = torch.zeros(len(read), 2 * len(self.samples), len(MODALITIES), device=device)
        shares[:, self._arrays.get("places", device)] = read
        return shares.unflatten(1, (len(self.samples), 2))

    @property
    def depths(self) -> torch.Tensor:
        """int64 [batch]: the layers after which a sample stops forking; 0 while it goes on."""
        return fading_depths(self.layers)

    def ends_fork(self) -> bool:
        """Whether all samples have stopped forking: the deepest of them decides for the batch."""
        if not self.chooses_depth:
            return False
        depths = self.depths
        return bool((depths > 0)[torch.from_numpy(self.samples).to(depths.device)].all())

    def home_weights(self, weights: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor | None:
        """Home row weights [batch, 4] with the samples' own alpha; those that forked before keep theirs."""
        self._indicators.clear()  # the fork has ended; they are as long as the pools
        if not self.chooses_alpha:
            return before
        chosen = weights.repeat(len(self.samples), 1) if before is None else before.clone()
        chosen[:, VISUAL : AUDIO + 1] = self.alphas
        if before is None:
            return chosen
        return torch.where(torch.from_numpy(self.samples).to(chosen.device)[:, None], chosen, before)

    @property
    def alphas(self) -> torch.Tensor:
        """float32 [batch, 2]: alpha per modality from the layers that have been read."""
        return alphas_of(self.layers)


def fading_depths(layers: torch.Tensor) -> torch.Tensor:
    """int64 [batch]: the first number of layers after which modalities are read less than `READING_FADES` times the
    most so far; 0 where that does not happen. ``layers``: shares [layers, batch, 2, 2]."""
    reading = layers[:, :, 0, 0] + layers[:, :, 1, 1]
    fades = reading < READING_FADES * reading.cummax(0).values
    return torch.where(fades.any(0), fades.int().argmax(0) + 1, 0)


def alphas_of(layers: torch.Tensor) -> torch.Tensor:
    """float32 [batch, 2], ``(1 + r) / 2`` with ``r = S[own branch] / (S[own branch] + S[other branch])`` per modality.

    S is summed over layers. ``layers``: shares [layers, batch, 2, 2]. 0.75 where nothing is read at all.
    """
    total = layers.sum(0)
    own = torch.stack([total[:, 0, 0], total[:, 1, 1]], -1)
    other = torch.stack([total[:, 1, 0], total[:, 0, 1]], -1)
    read = torch.where(own + other > 0, own / (own + other).clamp(min=1e-30), 0.5)
    return (1 + read) / 2

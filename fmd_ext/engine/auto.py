"""Settings that a prompt chooses for itself, from the attention of its last token in the fork: alpha="auto" and
fork_layers="auto". docs/calibration.md defines and justifies both; they are ours, not the paper's.

The last token has a row in each branch. Its attention there, summed over the keys of a modality and averaged over the
heads, is the share S[branch, modality]; one such row per branch and layer is all that is computed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fmd_ext.config import AUTO, FMDConfig
from fmd_ext.engine.call import Call
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
        layers: for each layer that has been read the shares, float32 [batch, 2, 2] (branch, modality).
    """

    def __init__(self, labels: np.ndarray, plan: Plan, chooses_depth: bool, chooses_alpha: bool) -> None:
        self.samples = samples = plan.begins
        self.chooses_depth = chooses_depth
        self.chooses_alpha = chooses_alpha
        self.layers: list[torch.Tensor] = []
        positions, home_rows, host = plan.positions, plan.home_rows, torch.device("cpu")
        qo_rows, cu_seqlens_q, key_ranges = (
            plan.fork.get(name, host).numpy() for name in ("qo_rows", "cu_seqlens_q", "key_ranges")
        )
        num_home, length = len(positions) - len(home_rows), labels.shape[1]
        label_of_row = labels.ravel()[positions]
        place_of_row = np.empty(len(positions), np.int64)
        place_of_row[qo_rows] = np.arange(len(qo_rows))
        self._rows: list[tuple[int, int, int, tuple[int, ...], np.ndarray]] = []
        for sample in np.flatnonzero(samples):
            own = np.flatnonzero(positions[:num_home] // length == sample)
            home = int(own[-1])  # rows are in the order of the positions
            away = num_home + np.flatnonzero(home_rows == home)
            home_branch = 1 if label_of_row[home] == AUDIO else 0
            for row, branch in ((home, home_branch), *((int(row), 1 - home_branch) for row in away)):
                group = int(np.searchsorted(cu_seqlens_q, place_of_row[row], side="right")) - 1
                keys = qo_rows[cu_seqlens_q[group] : cu_seqlens_q[group + 1]]  # the branch holds this call's rows only
                self._rows.append((int(sample), branch, row, tuple(key_ranges[group].tolist()), label_of_row[keys]))
        self._masks: dict[torch.device, list[torch.Tensor]] = {}

    def observe(self, rows: torch.Tensor, pool: torch.Tensor, scale: float) -> None:
        """One forked layer: queries [rows, num_qo_heads, head_dim] and the pool [num_kv_heads, num_slots, head_dim]."""
        shares = torch.zeros(len(self.samples), 2, 2, device=rows.device)
        for (sample, branch, row, segment, _), of_modality in zip(
            self._rows, self._modalities(rows.device), strict=True
        ):
            kv_start, kv_len, prefix_start, prefix_len = segment
            query = rows[row].float().view(pool.shape[0], -1, rows.shape[-1])
            parts = [
                query @ pool[:, start : start + length].float().transpose(-1, -2) * scale
                for start, length in ((kv_start, kv_len), (prefix_start, prefix_len))
            ]
            weights = torch.cat(parts, dim=-1).softmax(-1).flatten(0, 1).mean(0)
            shares[sample, branch] = of_modality @ weights[:kv_len]
        self.layers.append(shares)

    def _modalities(self, device: torch.device) -> list[torch.Tensor]:
        """float32 [2, keys] for each row: 1 where the key is of the modality."""
        if device not in self._masks:
            self._masks[device] = [
                torch.from_numpy(np.stack([np.isin(labels, own) for own in MODALITIES]).astype(np.float32)).to(device)
                for *_, labels in self._rows
            ]
        return self._masks[device]

    @property
    def depths(self) -> torch.Tensor:
        """int64 [batch]: the layers after which a sample stops forking; 0 while it goes on."""
        return fading_depths(torch.stack(self.layers))

    def ends_fork(self) -> bool:
        """Whether all samples have stopped forking: the deepest of them decides for the batch."""
        if not self.chooses_depth:
            return False
        samples = torch.from_numpy(self.samples).to(self.layers[0].device)
        return bool((self.depths > 0)[samples].all())

    def home_weights(self, weights: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor | None:
        """Home row weights [batch, 4] with the samples' own alpha; those that forked before keep theirs."""
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
        return alphas_of(torch.stack(self.layers))


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

"""How one token's attention is divided among video, audio and text, in a model as it is or patched.

Only the row of that token is computed, from the queries and keys that the attention function gets, so any attention
implementation will do and no [length, length] matrix is made.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn

from fmd_ext.adapters import find_adapter
from fmd_ext.engine.call import Call
from fmd_ext.lab.interception import intercepting
from fmd_ext.labels import AUDIO, JOINT, LABELS, PADDING, TEXT
from fmd_ext.patching.handle import handle_of

SHARES = ("text", "visual", "audio")


@dataclasses.dataclass(frozen=True)
class LayerShare:
    """The shares of one row of one layer's attention; visual + audio + text = 1.

    ``branch`` is ``"visual"`` or ``"audio"`` in a forked layer, ``"all"`` where every position is seen.
    """

    layer: int
    branch: str
    visual: float
    audio: float
    text: float


@dataclasses.dataclass(frozen=True)
class AttentionShare:
    """Attention of one token, averaged over heads: one entry per layer, two in a forked layer (one per branch)."""

    layers: tuple[LayerShare, ...]

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches that occur, in the order of the layers."""
        return tuple(dict.fromkeys(layer.branch for layer in self.layers))

    def mean(self, branch: str | None = None) -> dict[str, float]:
        """Average over the layers of ``branch``; None: over all layers, a forked one counting as one layer.

        Returns ``{"visual": ..., "audio": ..., "text": ...}``, which sums to 1.
        """
        chosen = [layer for layer in self.layers if branch in (None, layer.branch)]
        if not chosen:
            raise ValueError(f"no layer has the branch {branch!r}; there are {', '.join(map(repr, self.branches))}")
        rows_of = {layer.layer: 0 for layer in chosen}
        for layer in chosen:
            rows_of[layer.layer] += 1
        return {
            name: sum(getattr(layer, name) / rows_of[layer.layer] for layer in chosen) / len(rows_of) for name in SHARES
        }


@torch.no_grad()
def attention_share(model: nn.Module, inputs: dict[str, Any], position: int = -1) -> AttentionShare:
    """Runs one forward call and measures where the attention of the token at ``position`` goes.

    Args:
        model: a model that `fmd_ext.patch` supports, patched or not; the full Qwen2.5-Omni is measured in its thinker.
        inputs: what the model's ``generate`` takes for one sample (input_ids [1, N], features, ...). Without input_ids
            they must hold inputs_embeds and modality_labels [1, N].
        position: index of the token, from the end when negative.

    Returns:
        Shares of the softmax weights by the modality of the key's position, averaged over the heads. A key that a
        branch keeps but with scaled or zeroed embedding still counts for its position's modality.

    Raises:
        ValueError: more than one sample, a position outside the sample or on padding, inputs without labels, or joint
            positions, whose share belongs to no single modality.
    """
    handle = handle_of(model)
    adapter = handle.adapter if handle is not None else find_adapter(model)
    labels = _labels(model, adapter, inputs)
    length = len(labels)
    if not -length <= position < length or labels[position] == PADDING:
        raise ValueError(f"position {position} is no token of the sample, which has {length} positions")
    recorder = _Recorder(labels, position % length)
    if handle is None:
        inputs = {name: value for name, value in inputs.items() if name != "modality_labels"}
    with intercepting(adapter.find_decoder(model), adapter.attention, recorder):
        adapter.find_entry(model)(**inputs, use_cache=False)
    return AttentionShare(tuple(recorder.shares))


def _labels(model: nn.Module, adapter: Any, inputs: dict[str, Any]) -> np.ndarray:
    """Modality labels [N] of the one sample."""
    given, ids = inputs.get("modality_labels"), inputs.get("input_ids")
    if given is not None:
        labels = torch.as_tensor(given)
    elif ids is not None:
        labels = adapter.labels_of(model, ids, inputs)
    else:
        raise ValueError("inputs hold neither input_ids nor modality_labels, so no position has a modality")
    if labels.shape[0] != 1:
        raise ValueError(f"attention is measured for one sample at a time, got {labels.shape[0]}")
    if (labels == JOINT).any():
        raise ValueError(
            "the sample has joint positions (label 3), which mix both modalities: their attention cannot be divided "
            "between visual and audio"
        )
    mask = inputs.get("attention_mask")
    if mask is not None:
        labels = labels.masked_fill(mask.to(labels.device) == 0, PADDING)
    return labels[0].cpu().numpy()


class _Recorder:
    def __init__(self, labels: np.ndarray, position: int) -> None:
        self.labels = labels
        self.position = position
        self.shares: list[LayerShare] = []

    def __call__(self, attend: Any, module: nn.Module, query: Any, key: Any, value: Any, mask: Any, scale: float, **kw):
        """Records, then does what the module's own attention function does; see `intercepting`."""
        call = kw.get("fmd_call")
        if call is not None:
            self.packed(module.layer_idx, query, key, call, scale)
        else:
            self.dense(module.layer_idx, query, key, mask, scale)
        return attend(module, query, key, value, mask, scaling=scale, **kw)

    def dense(self, layer: int, query: torch.Tensor, key: torch.Tensor, mask: Any, scaling: float) -> None:
        """query [1, num_qo_heads, N, head_dim], key [1, num_kv_heads, N, head_dim], mask [1, 1, N, N] or None."""
        visible = torch.from_numpy((np.arange(len(self.labels)) <= self.position) & (self.labels != PADDING))
        bias = None
        if torch.is_tensor(mask) and mask.dim() == 4:
            row = mask[0, :, self.position, : len(self.labels)]
            bias = row if row.is_floating_point() else torch.where(row, 0.0, -torch.inf)
        slots = visible.nonzero()[:, 0]
        weights = _row_weights(query[0, :, self.position], key[0], slots, scaling, bias)
        self._add(layer, "all", weights, self.labels[slots.numpy()])

    def packed(self, layer: int, query: torch.Tensor, pool: torch.Tensor, call: Call, scaling: float) -> None:
        """query [1, num_qo_heads, rows, head_dim], pool [num_kv_heads, num_slots, head_dim]."""
        plan, attention, host = call.plan, call.layer_plan(layer), torch.device("cpu")
        qo_rows, cu_seqlens, key_ranges, slots = (
            attention.get(name, host).numpy() for name in ("qo_rows", "cu_seqlens_q", "key_ranges", "slots")
        )
        label_of_slot = np.full(pool.shape[1], PADDING, np.int8)
        label_of_slot[slots] = self.labels[plan.positions[: len(slots)]]
        home = int(np.flatnonzero(plan.positions[: plan.num_home] == self.position)[0])
        branch_of = {home: "all"}
        if call.is_forked(layer) and plan.forked[0]:
            branch_of = self._branches(home, (plan.num_home + np.flatnonzero(plan.home_rows == home)).tolist())
        for row, branch in branch_of.items():
            place = int(np.flatnonzero(qo_rows == row)[0])
            group = int(np.searchsorted(cu_seqlens, place, side="right")) - 1
            kv_start, kv_len, prefix_start, prefix_len = key_ranges[group].tolist()
            unseen = int(cu_seqlens[group + 1]) - place - 1  # keys of the group's later queries
            seen = np.r_[prefix_start : prefix_start + prefix_len, kv_start : kv_start + kv_len - unseen]
            weights = _row_weights(query[0, :, row], pool, torch.from_numpy(seen), scaling)
            self._add(layer, branch, weights, label_of_slot[seen])

    def _branches(self, home: int, away: list[int]) -> dict[int, str]:
        """The branch of the position's rows: home is in its own modality's, text in the visual one, away in the other.

        A text row without an away row is of the prefix, which all branches share.
        """
        label = self.labels[self.position]
        if label == TEXT and not away:
            return {home: "all"}
        own, other = ("audio", "visual") if label == AUDIO else ("visual", "audio")
        return {home: own, **dict.fromkeys(away, other)}

    def _add(self, layer: int, branch: str, weights: torch.Tensor, labels: np.ndarray) -> None:
        weights = weights.numpy()
        self.shares.append(
            LayerShare(layer, branch, **{name: float(weights[labels == LABELS[name]].sum()) for name in SHARES})
        )


def _row_weights(
    query: torch.Tensor, keys: torch.Tensor, slots: torch.Tensor, scaling: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax weights, mean over heads, float32 [slots] on the CPU, of one query row.

    query [num_qo_heads, head_dim], keys [num_kv_heads, num_slots, head_dim], slots int64: the visible ones, bias
    [1 or num_qo_heads, num_slots] or None.
    """
    group_size = query.shape[0] // keys.shape[0]
    slots = slots.to(keys.device)
    visible = keys.index_select(1, slots).float().repeat_interleave(group_size, dim=0)
    scores = torch.einsum("hd,hsd->hs", query.float(), visible) * scaling
    if bias is not None:
        scores = scores + bias.index_select(1, slots).float()
    return scores.softmax(dim=-1).mean(dim=0).cpu()

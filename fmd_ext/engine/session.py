"""What a patch remembers while in force: its settings, the labels of calls to come, the plan of the running one."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fmd_ext.adapters import AUDIO, JOINT, PADDING, TEXT, VISUAL
from fmd_ext.config import FMDConfig
from fmd_ext.engine.plan import StepPlan

UNREAD_BRANCHES = (
    "branch_embeds are read at joint positions only (label 3, visual and audio mixed in one embedding), and the labels "
    "have none"
)


class OneAtATime:
    """A context that one thread at a time is in, as often as it likes; a copy is another one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> OneAtATime:
        return OneAtATime()

    def __reduce__(self) -> Any:
        raise TypeError(
            "a patched model cannot be pickled, which is how torch.save keeps a whole model: unpatch it first, or save "
            "its weights (save_pretrained, state_dict), which are those of the unpatched model"
        )


class Session:
    """State that the replaced methods of one patched model share.

    Attributes:
        turn: every call holds it, so that calls of several threads follow one another: the state is that of one call.
        config: the resolved settings.
        token: identifies the patch to its caches; a copy of a cache keeps it.
        plan: the plan of the forward call that is running, else None.
        last_plan: the plan of the last forward call that succeeded.
        fixed_plan: while set, the plan of every forward call: the decode runner's, which advances it itself.
    """

    def __init__(self, config: FMDConfig) -> None:
        self.turn = OneAtATime()
        self.config = config
        self.token = uuid.uuid4().hex
        self.plan: StepPlan | None = None
        self.last_plan: StepPlan | None = None
        self.fixed_plan: StepPlan | None = None
        self._prompt_width: int | None = None
        self._merge_weights: dict[tuple, torch.Tensor] = {}
        self._labels: np.ndarray | None = None
        self._are_by_hand = False
        self._branches: tuple[torch.Tensor, int] | None = None

    @property
    def has_labels(self) -> bool:
        return self._labels is not None

    @property
    def labels_by_hand(self) -> np.ndarray | None:
        """The labels in force, where the user gave them."""
        return self._labels if self._are_by_hand else None

    @contextlib.contextmanager
    def labels(self, modality_labels: Any, by_hand: bool = True) -> Iterator[None]:
        """Within this context the calls' positions carry ``modality_labels``; see `Handle.labels`.

        ``by_hand``: the user gave them; else they were read off a call.
        """
        labels = check_labels(modality_labels)
        with self.turn:
            before = self._labels, self._are_by_hand
            self._labels, self._are_by_hand = labels, by_hand
            try:
                yield
            finally:
                self._labels, self._are_by_hand = before

    def labels_for(self, batch: int) -> np.ndarray | None:
        """The labels in force for a call of ``batch`` samples, repeated as `generate` repeats samples."""
        if self._labels is None or len(self._labels) == batch:
            return self._labels
        if batch % len(self._labels):
            raise ValueError(f"modality_labels are for {len(self._labels)} samples, the call has {batch}")
        return self._labels.repeat(batch // len(self._labels), axis=0)

    @contextlib.contextmanager
    def branches(self, branch_embeds: torch.Tensor | None, first: int) -> Iterator[None]:
        """Within this context joint positions take their embeddings from ``branch_embeds`` [2, batch, n, hidden].

        They belong to the n positions from ``first`` on. None leaves what is in force.
        """
        before = self._branches
        if branch_embeds is not None:
            if self._labels is None or not (self._labels == JOINT).any():
                raise ValueError(UNREAD_BRANCHES)
            self._branches = (branch_embeds, first)
        try:
            yield
        finally:
            self._branches = before

    def branches_for(self, batch: int, past: int, length: int) -> torch.Tensor | None:
        """Embeddings [2, batch, at most length, hidden] of a call's first positions, repeated as `labels_for` does."""
        if self._branches is None:
            return None
        embeds, first = self._branches
        here = embeds[:, :, past - first : past - first + length]
        return here if here.shape[1] == batch else here.repeat_interleave(batch // here.shape[1], dim=1)

    def merge_weights(self, device: torch.device) -> torch.Tensor:
        """The config's `merge_weights`, float32 [4]. Kept: copying them in every call would wait for the device."""
        key = (self.config.merge_weights, device)
        if key not in self._merge_weights:
            self._merge_weights[key] = torch.tensor(key[0], dtype=torch.float32, device=device)
        return self._merge_weights[key]

    @contextlib.contextmanager
    def generating(self, attention_mask: Any) -> Iterator[None]:
        """The context of a ``generate`` call. Read back here once, the prompt's mask need not be for every token."""
        before = self._prompt_width
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 and bool(attention_mask[:, -1].all()):
            self._prompt_width = attention_mask.shape[1]
        try:
            yield
        finally:
            self._prompt_width = before

    def is_generated(self, attention_mask: torch.Tensor | None, length: int) -> bool:
        """Whether it is known without a look at ``attention_mask`` that a cached call's new position is no padding."""
        if attention_mask is None or self._prompt_width is None or length != 1 or attention_mask.dim() != 2:
            return False
        return attention_mask.shape[1] >= self._prompt_width


def check_labels(labels: Any, batch: int | None = None) -> np.ndarray:
    """Modality labels as int8 numpy [batch, length]. Raises TypeError or ValueError saying what is accepted."""
    accepted = "modality_labels must be whole numbers [batch, length]: 0 text, 1 visual, 2 audio, 3 joint, -1 padding"
    try:
        array = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    except ValueError:  # rows of unequal length
        raise ValueError(f"{accepted}; got rows of unequal length") from None
    if array.dtype.kind not in "iu":
        raise TypeError(f"{accepted}; got dtype {array.dtype}")
    if array.ndim != 2 or len(array) == 0 or (batch is not None and len(array) != batch):
        expected = "" if batch is None else f" (batch {batch})"
        raise ValueError(f"{accepted}; got shape {list(array.shape)}{expected}")
    unknown = np.setdiff1d(array, (PADDING, TEXT, VISUAL, AUDIO, JOINT))
    if unknown.size:
        raise ValueError(f"{accepted}; got {unknown[:5].tolist()}")
    return array.astype(np.int8)

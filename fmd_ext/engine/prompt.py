"""The modality labels of a prompt, and which forward calls belong to that prompt."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import torch

from fmd_ext.engine.routes import Routes
from fmd_ext.labels import AUDIO, JOINT, PADDING, TEXT, VISUAL

UNREAD_BRANCHES = (
    "branch_embeds are read at joint positions only (label 3, visual and audio mixed in one embedding), and the labels "
    "have none"
)


class Prompt:
    """Modality labels of sequences, counted from their start, and what they were read from.

    Args:
        labels: int8 [batch, length] (-1 padding, 0 text, 1 visual, 2 audio, 3 joint), cached positions included; later
            positions are text. None: all is text.
        source: what the labels belong to: token ids [batch, n] or embeddings [batch, n, hidden] of the positions from
            ``first`` on. None: the labels hold for any call.
        first: cached positions before ``source`` and ``branch_embeds``.
        branch_embeds: [2, batch, n, hidden], embeddings of joint positions in the visual and in the audio branch.
        virtual: positions that PEFT's prompt learning puts before ``source``; ``labels`` count them.
        is_read: the labels were read off token ids; otherwise they were given by hand.
        routes: what the samples' questions need, where the settings leave the weight at text positions to them.
        mask_width: columns of the prompt's attention mask, where its last column is known to hold no padding.

    Raises ValueError for ``branch_embeds`` without joint positions.
    """

    def __init__(
        self,
        labels: np.ndarray | None,
        source: torch.Tensor | None = None,
        first: int = 0,
        branch_embeds: torch.Tensor | None = None,
        mask_width: int | None = None,
        is_read: bool = False,
        virtual: int = 0,
        routes: Routes | None = None,
    ) -> None:
        if branch_embeds is not None and (labels is None or not (labels == JOINT).any()):
            raise ValueError(UNREAD_BRANCHES)
        self.labels = labels
        self.source = source
        self.first = first
        self.branch_embeds = branch_embeds
        self.mask_width = mask_width
        self.is_read = is_read
        self.virtual = virtual
        self.routes = routes
        self._has_begun = False
        self._origin: Prompt = self

    def with_branches(self, branch_embeds: torch.Tensor, first: int) -> Prompt:
        """The same prompt with embeddings of its joint positions from position ``first`` on."""
        given = self.mask_width, self.is_read, self.virtual, self.routes
        prompt = Prompt(self.labels, self.source, first, branch_embeds, *given)
        prompt._origin = self._origin
        return prompt

    def with_routes(self, routes: Routes | None) -> Prompt:
        """The same prompt, routed. It is a copy: the labels of a context serve prompts with several questions."""
        prompt = copy.copy(self)
        prompt.routes = routes
        return prompt

    def is_one_with(self, other: Prompt | None) -> bool:
        """Whether both are the same prompt, with or without branches."""
        return other is not None and self._origin is other._origin

    def __deepcopy__(self, memo: dict[int, Any]) -> Prompt:
        """Returns the prompt itself: a copied cache belongs to the same prompt."""
        return self

    @functools.cached_property
    def has_content(self) -> bool:
        """Whether any position is visual, audio or joint."""
        return self.labels is not None and bool((self.labels > TEXT).any())

    def labels_for(self, batch: int) -> np.ndarray | None:
        """The labels for a call of ``batch`` samples, repeated as `generate` repeats samples.

        Raises ValueError where ``batch`` is no multiple of the labels' samples.
        """
        if self.labels is None or len(self.labels) == batch:
            return self.labels
        if batch % len(self.labels):
            raise ValueError(f"modality_labels are for {len(self.labels)} samples, the call has {batch}")
        return self.labels.repeat(batch // len(self.labels), axis=0)

    def branches_for(self, batch: int, past: int, length: int) -> torch.Tensor | None:
        """Embeddings [2, batch, at most length, hidden] of a call's first positions, repeated as `labels_for` does."""
        if self.branch_embeds is None:
            return None
        here = self.branch_embeds[:, :, past - self.first : past - self.first + length]
        return here if here.shape[1] == batch else here.repeat_interleave(batch // here.shape[1], dim=1)

    def begin(self) -> Prompt:
        """Notes that the first call with this prompt has come. Returns the prompt."""
        self._origin._has_begun = True
        return self

    @property
    def waits_for_its_labels(self) -> bool:
        """Whether labels were given by hand and no call has used them yet."""
        return self.has_content and not self.is_read and not self._origin._has_begun

    def fits(self, embeds: torch.Tensor) -> bool:
        """Whether ``embeds`` [batch, length, hidden] can be this prompt: no call has come yet, and the sizes agree.

        Some models have an outer ``generate`` that embeds the ids and calls an inner ``generate`` with the embeddings.

        Raises:
            ValueError: more embeddings than ids that the labels were read off.
        """
        if self.labels is None or self._origin._has_begun or embeds.shape[0] % len(self.labels):
            return False
        length = self.labels.shape[1] - self.first
        self.check_positions(length, max(length, embeds.shape[1]))
        return embeds.shape[1] == length

    def check_positions(self, ids: int, positions: int) -> None:
        """Raises ValueError where labels were read off ``ids`` token ids and the decoder gets other positions."""
        if self.is_read and self.has_content and ids != positions:
            raise ValueError(
                f"the prompt has {ids} token ids, and the decoder gets {positions} positions: labels read off the ids "
                "would stand beside them. Patch the language model alone, with adapter='text', and give modality_labels"
            )

    def starts(self, given: torch.Tensor | None) -> bool:
        """Whether a call with token ids or embeddings ``given``, on an empty cache, begins this prompt.

        Samples may be repeated, and the call may hold less than the prompt (a chunk) or more (candidates).
        """
        source = self.source
        if given is None or source is None or given.shape[0] % source.shape[0]:
            return False
        if self.virtual and given.dim() == 3:  # ids have become embeddings behind those of the virtual positions
            return not self.is_read and given.shape[1] == self.virtual + source.shape[1]
        if given.dim() != source.dim():
            return False
        common = min(given.shape[1], source.shape[1])
        repeats = given.shape[0] // source.shape[0]
        own = source[:, :common].repeat_interleave(repeats, dim=0).to(given.device)
        return torch.equal(given[:, :common].to(own.dtype), own)


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


def covering(labels: np.ndarray, length: int) -> np.ndarray:
    """Checks labels [batch, n] that were given by hand for a sequence of ``length`` positions; returns them.

    Labels past the end of the sequence are those of later calls. Raises ValueError for fewer labels than positions.
    """
    if labels.shape[1] < length:
        raise ValueError(
            f"modality_labels are for {labels.shape[1]} positions, the sequence has {length}: label every one, 0 where "
            "it is text, as virtual tokens before the prompt are"
        )
    return labels


def modality_bits(labels: np.ndarray) -> np.ndarray:
    """The modalities that occur in ``labels`` [batch, length], int8 [batch]: bit 1 visual, bit 2 audio, joint both."""
    joint = (labels == JOINT).any(1)
    visual, audio = (labels == VISUAL).any(1) | joint, (labels == AUDIO).any(1) | joint
    return visual.astype(np.int8) | audio.astype(np.int8) << 1

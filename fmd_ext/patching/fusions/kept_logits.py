"""Logits of the positions that `generate` reads, for models whose own forward makes those of the whole prompt.

transformers asks for the last position's by ``logits_to_keep`` where a model's forward has that argument. The thinkers
of Qwen2.5-Omni and Qwen3-Omni have not: a prompt of 32k positions and 152k words is 10 GB of logits in bfloat16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fmd_ext import compat
from fmd_ext.engine.session import Session
from fmd_ext.patching.fusions.products import HOOKS
from fmd_ext.patching.installation import Installation


class KeptLogits:
    """Which positions' logits the running forward call of the entry wants.

    Attributes:
        is_on: whether the entry takes ``logits_to_keep`` through this.
        wanted: so many last positions (0: all), or those at the indices.
    """

    def __init__(self) -> None:
        self.is_on = False
        self.wanted: int | Tensor = 0

    @contextlib.contextmanager
    def of(self, call: dict[str, Any]) -> Iterator[None]:
        """The context of a forward call; takes its argument out of it."""
        before = self.wanted
        self.wanted = call.pop(compat.KEPT_LOGITS, 0) if self.is_on else 0
        try:
            yield
        finally:
            self.wanted = before


class HeadOfKept:
    """Replacement of the ``forward`` of an output layer."""

    def __init__(self, session: Session, original: Any, kept: KeptLogits) -> None:
        self.original = original
        self.kept = kept

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """[batch, positions, hidden] -> [batch, kept positions, vocabulary]."""
        wanted = self.kept.wanted
        # Other shapes are not those of the running forward call, but of a question asked within it.
        if len(args) != 1 or args[0].dim() != 3 or (isinstance(wanted, int) and not wanted):
            return self.original(*args, **kwargs)
        return self.original(args[0][:, slice(-wanted, None) if isinstance(wanted, int) else wanted])


class Supported:
    """Replacement of the method by which transformers asks whether a model takes ``logits_to_keep``."""

    def __init__(self, session: Session, original: Any) -> None:
        self.original = original

    def __call__(self, module: nn.Module) -> bool:
        return True


def put_on(put: Installation, entry: nn.Module, kept: KeptLogits) -> str:
    """Puts it on; returns why not, where it does not."""
    supports = getattr(entry, compat.SUPPORTS_KEPT_LOGITS, None)
    head = entry.get_output_embeddings() if supports is not None else None
    if head is None:
        return "the model has no output layer of its own"
    if supports():
        return "the model's forward does it"
    if "forward" in head.__dict__ or any(getattr(head, hooks, None) for hooks in HOOKS):
        return "the output layer has hooks, or another forward than its own"
    put.override(head, "forward", HeadOfKept, kept)
    put.override(entry, compat.SUPPORTS_KEPT_LOGITS, Supported)
    kept.is_on = True
    return ""

"""The decode steps of one `generate` call. A step whose buffers are full is replaced by one with larger buffers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from fmd_ext.decode.step import StaticStep, StepInputs
from fmd_ext.decode.store import StepStore
from fmd_ext.engine.forward import check_length

# Room for new positions in the first buffers of a call, if the call may generate as many.
ROOM = 1024


class StepSequence:
    """Static steps that continue the sequences of a cache.

    Args:
        store: lends steps, and takes them back.
        cache: filled by the patched model; nothing else may use it until `close`.
        call: arguments of the first step as the model's own loop would pass them.
        remaining: the largest number of steps that can follow.
    """

    def __init__(self, store: StepStore, model: nn.Module, cache: Cache, call: dict[str, Any], remaining: int) -> None:
        self.store = store
        self.model = model
        self.cache = cache
        self.state = cache.layers[0].state
        self.inputs = StepInputs.of(call)
        self.remaining = remaining
        self.step: StaticStep | None = None
        self.fed = 0  # tokens that were fed and are not in the cache's lengths yet
        self.room = 0
        self.total = 0

    def feed(self, tokens: torch.Tensor) -> torch.Tensor:
        """The next logits [batch, vocabulary] after ``tokens`` [batch]; the next call overwrites them.

        Raises ValueError at the model's limit of positions.
        """
        check_length(self.store.decoder, self.state.logical_length + self.fed + 1)
        if self.room == 0:
            self._make_room()
        self.step.tokens.copy_(tokens[:, None])
        logits = self.step.run(self.cache)
        self.fed += 1
        self.room -= 1
        self.total += 1
        return logits

    def _make_room(self) -> None:
        self._count()
        full, inputs = self.step, self.inputs
        if full is not None:
            inputs = dataclasses.replace(inputs, positions=full.positions)
        self.step = self.store.take(self.model, self.cache, inputs, max(1, min(self.remaining - self.total, ROOM)))
        if full is not None:
            self.store.keep(full)
        self.room = self.state.text_room

    def _count(self) -> None:
        self.state.extend(self.fed)
        self.fed = 0

    def close(self, undo: int, keep_cache: bool) -> None:
        """Ends the steps and removes the last ``undo`` of them from the cache.

        The cache then holds what was fed; with ``keep_cache`` False, which costs no copy, it is empty.
        """
        self._count()
        self.state.crop(undo)
        if self.step is None:
            return
        if not keep_cache:
            self.cache.reset()
        elif self.step.pools is not None:
            self.state.leave_pools()
        self.store.keep(self.step)

    def describe(self) -> str:
        """What the steps ran on."""
        if self.step is None:
            return "decode runner: no step was needed"
        if self.step.graph is not None:
            return f"decode runner: {self.total} replays of a captured graph"
        return f"decode runner: {self.total} static steps without a CUDA graph: {self.step.why_no_graph}"

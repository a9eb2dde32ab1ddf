"""Static steps that are kept for later calls of the same shape."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache

from fmd_ext.decode.fingerprint import fingerprint
from fmd_ext.decode.step import CaptureSite, StaticStep, StepInputs
from fmd_ext.engine.cache import BranchedState
from fmd_ext.engine.call import Call
from fmd_ext.engine.session import Session
from fmd_ext.ops import dispatch

# Captured ones. Each holds K and V of its shape's whole context.
KEPT_STEPS = 4


class StepStore:
    """The steps of one patched model.

    Args:
        session: the patch's.
        decoder: the text decoder that the steps run.
    """

    def __init__(self, session: Session, decoder: nn.Module) -> None:
        self.session = session
        self.decoder = decoder
        self._steps: OrderedDict[tuple, StaticStep] = OrderedDict()
        self._sites: dict[torch.device, CaptureSite] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def take(self, model: nn.Module, cache: Cache, inputs: StepInputs, room: int) -> StaticStep:
        """A loaded step whose pools hold the keys of ``cache``, with room for ``room`` positions or more.

        Without graphs a step runs over the cache's own pools, which nothing has captured: no key moves, and nothing is
        kept. Its room is that of the cache, at least one position.
        """
        state = cache.layers[0].state
        if not StaticStep.has_graphs(state.layers[0].keys.device):
            call = self._call(state)
            step = StaticStep(model, self.session, state)
            step.load(call, inputs)
            return step
        tables = state.tables_with_room(room)
        # Everything that the launches of a step depend on, except the contents of its buffers.
        key = (
            (state.batch, state.fork_layers, tuple(state.phase), state.home_weights is None),
            tuple(table.num_slots for table in tables),
            (inputs.key, self.session.config, dispatch.splits_are_fixed()),
            fingerprint(self.decoder, model.get_output_embeddings()),
        )
        step = self._steps.pop(key, None) or StaticStep(model, self.session, state, tables)
        if step.graph is not None:
            self._site_on(step.device).enter()
        state.move(*tables, step.pools)
        call = self._call(state)
        step.load(call, inputs)
        if step.graph is None and not step.why_no_graph:
            step.capture(cache, self._site_on(step.device))
            step.load(call, inputs)
        step.key = key
        return step

    def keep(self, step: StaticStep) -> None:
        """Takes a step back, for the next call of its shape."""
        if step.pools is None:
            return
        if step.graph is not None:
            self._site_on(step.device).leave()
        self._steps[step.key] = step
        while len(self._steps) > KEPT_STEPS:
            self._steps.popitem(last=False)

    def _call(self, state: BranchedState) -> Call:
        """The call that adds one text position to every sample."""
        text = np.zeros((state.batch, 1), np.int8)
        return self.session.open_call(state.plan_call(text), text, state)

    def clear(self) -> None:
        """Frees all steps, their graphs and pools."""
        self._steps.clear()
        self._sites.clear()

    def _site_on(self, device: torch.device) -> CaptureSite:
        if device not in self._sites:
            self._sites[device] = CaptureSite.on(device)
        return self._sites[device]

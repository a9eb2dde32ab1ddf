"""Which `generate` calls run over static steps, and the steps that are kept for the next of the same shape."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode

from fmd_ext.engine.forward import check_length
from fmd_ext.engine.session import Session
from fmd_ext.ops import dispatch

from .fingerprint import fingerprint, hooked
from .loop import StaticLoop
from .step import CaptureSite, StaticStep, StepInputs

logger = logging.getLogger(__name__)

# New positions that a cache gets room for at once, where the call may generate as many.
ROOM = 1024
# Steps kept for later calls. Each holds K and V of its shape's whole context.
KEPT_STEPS = 4
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# Settings of generate that need what a static step does not give, and what that is.
UNSUPPORTED = {
    "output_attentions": "attention weights",
    "output_hidden_states": "hidden states of every step",
    "stop_strings": "the tokenizer, which transformers does not hand on",
    "token_healing": "the tokenizer, which transformers does not hand on",
    "is_assistant": "a cache that is cropped between calls",
}


class DecodeRunner:
    """Runs the decode steps of a patched model's ``generate``. One per patched model.

    Args:
        session: the patch's.
        decoder: the text decoder, whose limit of positions holds.
        wanted: True or False as the user asked; None: on CUDA, where the model forks.

    Attributes:
        last: what the last ``generate`` call's decode steps ran on, or why not here; "" before the first.
        run_ahead: start the next step's forward before it is known that there is one, so that a GPU never waits for the
            host. None: on CUDA.
    """

    def __init__(self, session: Session, decoder: nn.Module, wanted: bool | None = None) -> None:
        self.session = session
        self.decoder = decoder
        self.wanted = wanted
        self.run_ahead: bool | None = None
        self.last = ""
        self._steps: OrderedDict[tuple, StaticStep] = OrderedDict()
        self._sites: dict[torch.device, CaptureSite] = {}
        self._said: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodeRunner:
        """A runner without steps: graphs and their buffers belong to one model."""
        session, decoder = (memo.get(id(part), part) for part in (self.session, self.decoder))
        memo[id(self)] = copied = DecodeRunner(session, decoder, self.wanted)
        copied.run_ahead = self.run_ahead
        return copied

    def generate(self, model: nn.Module, original: Callable[..., Any], call: dict[str, Any]) -> Any:
        """``original(**call)``, which is ``model.generate``, over static steps where that is possible."""
        self.last = self._off(model)
        if not self.last:
            self.last = self._refusal(model, call)
            if self.last and self.last not in self._said:
                self._said.add(self.last)
                logger.warning("fmd_ext: this generate call runs without the decode runner: %s", self.last)
        if self.last:
            return original(**call)
        return original(**{**call, "custom_generate": StaticLoop(self, call)})

    def _off(self, model: nn.Module) -> str:
        """Why the runner is off for this model; "" where it is on."""
        if self.wanted is None and not self.session.config.fork_layers:
            return "off with fork_layers=0, where the model's own path runs; patch(..., runner=True) switches it on"
        if self.wanted is None and model.device.type != "cuda":
            return f"off on {model.device.type}; patch(..., runner=True) switches it on"
        return "switched off by patch(..., runner=False)" if self.wanted is False else ""

    def _refusal(self, model: nn.Module, call: dict[str, Any]) -> str:
        """Why this call cannot run here; "" where it can."""
        if not isinstance(model, GenerationMixin) or model.config.is_encoder_decoder:
            return f"{type(model).__name__} does not generate by transformers' loop for decoders"
        if call.get("custom_generate") is not None:
            return "custom_generate is given"
        if call.get("synced_gpus"):
            return "synced_gpus is set"
        places = {parameter.device for parameter in self.decoder.parameters()}
        if len(places) != 1:
            return f"the decoder lies on {len(places)} devices"
        path = dispatch.of_decoder(self.decoder)
        if path.name == "torch":
            return f"attention runs by torch's own operations, which no graph can capture: {path.why}"
        if StaticStep.has_graphs(model.device) and (name := hooked(model)):
            return f"{name} has a forward hook, which the replay of a graph would not run"
        rope = getattr(self.decoder.rotary_emb, "rope_type", "default")
        if not isinstance(rope, str) or rope in ("dynamic", "longrope"):
            return f"rotary embedding of type {rope!r} changes with the length"
        named = set(inspect.signature(GenerationMixin.generate).parameters) - {"generation_config"}
        settings = {name: value for name, value in call.items() if name not in named}
        config, _ = model._prepare_generation_config(settings.pop("generation_config", None), **settings)
        mode = config.get_generation_mode(call.get("assistant_model"))
        if mode not in MODES:
            return f"the mode is {mode.value.replace('_', ' ')}, and only greedy search and sampling run there"
        for name, needed in UNSUPPORTED.items():
            if getattr(config, name, None):
                return f"{name} needs {needed}"
        if config.use_cache is False:
            return "use_cache is off"
        return ""

    # --- steps ----------------------------------------------------------------------------------------------------

    def begin(self, model: nn.Module, cache: Cache, call: dict[str, Any], remaining: int) -> Decoding:
        """Static steps behind what ``cache`` holds.

        Args:
            cache: filled by the patched model; not to be used by others until `Decoding.close`.
            call: arguments of the first step as the model's own loop would pass them.
            remaining: the largest number of steps that can follow.
        """
        return Decoding(self, model, cache, StepInputs.of(call), remaining)

    def step_for(self, model: nn.Module, cache: Cache, inputs: StepInputs, room: int) -> StaticStep:
        """A loaded step whose pools hold the keys of ``cache``, with room for ``room`` positions or more."""
        state = cache.layers[0].state
        tables = state.tables_with_room(room)
        # All that the launches of a step depend on, apart from what lies in its buffers.
        key = (
            (state.batch, state.fork_layers, tuple(state.phase), tuple(table.num_slots for table in tables)),
            (inputs.key, self.session.config),
            fingerprint(self.decoder, model.get_output_embeddings()),
        )
        step = self._steps.pop(key, None) or StaticStep(model, self.session, state, tables)
        if step.graph is not None:
            self._site_on(step.device).enter()
        state.move(*tables, step.pools)
        plan = state.make_plan(np.zeros((state.batch, 1), np.int8))
        step.load(plan, inputs)
        if step.graph is None and not step.why_no_graph:
            step.capture(cache, self._site_on(step.device))
            step.load(plan, inputs)
        step.key = key
        return step

    def keep(self, step: StaticStep) -> None:
        """Takes a step back, for the next call of its shape."""
        if step.graph is not None:
            self._site_on(step.device).leave()
        self._steps[step.key] = step
        while len(self._steps) > KEPT_STEPS:
            self._steps.popitem(last=False)

    def forget(self) -> None:
        """Lets go of all steps, their graphs and pools."""
        self._steps.clear()
        self._sites.clear()

    def _site_on(self, device: torch.device) -> CaptureSite:
        if device not in self._sites:
            self._sites[device] = CaptureSite.on(device)
        return self._sites[device]


class Decoding:
    """The decode steps of one ``generate`` call."""

    def __init__(
        self, runner: DecodeRunner, model: nn.Module, cache: Cache, inputs: StepInputs, remaining: int
    ) -> None:
        self.runner = runner
        self.model = model
        self.cache = cache
        self.state = cache.layers[0].state
        self.inputs = inputs
        self.remaining = remaining
        self.step: StaticStep | None = None
        self.fed = 0  # tokens fed that the cache's lengths do not count yet
        self.room = 0
        self.total = 0

    def feed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [batch, vocabulary] behind ``tokens`` [batch]; the next call overwrites them.

        Raises ValueError at the model's limit of positions.
        """
        check_length(self.runner.decoder, self.state.logical_length + self.fed + 1)
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
        self.step = self.runner.step_for(self.model, self.cache, inputs, max(1, min(self.remaining - self.total, ROOM)))
        if full is not None:
            self.runner.keep(full)
        self.room = self.state.text_room

    def _count(self) -> None:
        self.state.extend(self.fed)
        self.fed = 0

    def close(self, undo: int, keep_cache: bool) -> None:
        """Ends the steps and takes the last ``undo`` of them back.

        The cache then holds what was fed; with ``keep_cache`` False, which costs no copy, it is empty.
        """
        self._count()
        self.state.crop(undo)
        if self.step is None:
            return
        if keep_cache:
            self.state.leave_pools()
        else:
            self.cache.reset()
        self.runner.keep(self.step)

    def describe(self) -> str:
        if self.step.graph is not None:
            return f"decode runner: {self.total} replays of a captured graph"
        return f"decode runner: {self.total} static steps without a CUDA graph: {self.step.why_no_graph}"

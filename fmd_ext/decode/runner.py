"""Which `generate` calls run over static steps."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode

from fmd_ext.engine.session import Session
from fmd_ext.ops import dispatch

from .fingerprint import hooked
from .loop import StaticLoop
from .sequence import StepSequence
from .step import StaticStep
from .store import StepStore

logger = logging.getLogger(__name__)

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# Where static steps are not slower than transformers' own, but for half a millisecond per call to begin them. A call
# that cannot run so is told of on CUDA, where it loses most of its speed; on a CPU it loses less than a tenth.
ON_BY_DEFAULT = ("cuda", "cpu")
# Settings of generate that static steps do not serve, and the reason.
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
        decoder: the text decoder that the steps run.
        wanted: True or False as the user asked; None: on the devices of `ON_BY_DEFAULT`, where the model forks.

    Attributes:
        steps: those that are kept for later calls.
        last: what the decode steps of the last ``generate`` call ran on, or why they did not run here; "" before the
            first call.
        run_ahead: start the next forward before the host knows whether generation goes on, so that a GPU never waits
            for the host. None: on CUDA only.
    """

    def __init__(self, session: Session, decoder: nn.Module, wanted: bool | None = None) -> None:
        self.session = session
        self.decoder = decoder
        self.wanted = wanted
        self.run_ahead: bool | None = None
        self.last = ""
        self.steps = StepStore(session, decoder)
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
            is_told = self.wanted or model.device.type == "cuda"
            if self.last and is_told and self.last not in self._said:
                self._said.add(self.last)
                logger.warning("fmd_ext: this generate call runs without the decode runner: %s", self.last)
        if self.last:
            return original(**call)
        loop = StaticLoop(self.begin, call, self.run_ahead)
        out = original(**{**call, "custom_generate": loop})
        self.last = loop.report
        return out

    def _off(self, model: nn.Module) -> str:
        """Why the runner is off for this model; "" where it is on."""
        if self.wanted is None and not self.session.config.fork_layers:
            return "off with fork_layers=0, where the model's own path runs; patch(..., runner=True) switches it on"
        if self.wanted is None and model.device.type not in ON_BY_DEFAULT:
            return f"off on {model.device.type}; patch(..., runner=True) switches it on"
        return "switched off by patch(..., runner=False)" if self.wanted is False else ""

    def _refusal(self, model: nn.Module, call: dict[str, Any]) -> str:
        """Why this call cannot run here; "" where it can."""
        if not isinstance(model, GenerationMixin) or model.config.is_encoder_decoder:
            return f"{type(model).__name__} does not generate by transformers' loop for decoders"
        if call.get("custom_generate") is not None:
            return "custom_generate is given"
        if self.session.generating is not None and self.session.generating.virtual:
            return "PEFT's prompt learning gives its steps no positions"
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

    def begin(self, model: nn.Module, cache: Cache, call: dict[str, Any], remaining: int) -> StepSequence:
        """Static steps that continue the sequences of ``cache``; see `StepSequence`."""
        return StepSequence(self.steps, model, cache, call, remaining)

    def forget(self) -> None:
        """Frees all steps, their graphs and pools."""
        self.steps.clear()

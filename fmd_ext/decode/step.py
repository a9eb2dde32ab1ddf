"""One decode step over static buffers: run again and again, on CUDA as the replay of a captured graph."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from fmd_ext.compat import cache_kwargs
from fmd_ext.engine.cache import BranchedState, Pools
from fmd_ext.engine.call import Call
from fmd_ext.engine.plan import growth_of
from fmd_ext.engine.session import Session

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class StepInputs:
    """What a decode step gets besides the token and the cache, as the model's own loop would pass it.

    Args:
        positions: [..., batch or 1, 1] int64, positions of the first step; every step adds one.
        tensors: other tensors with one value per sample, the same in every step.
        options: plain arguments (numbers, strings, None).
    """

    positions: torch.Tensor
    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]

    @classmethod
    def of(cls, call: dict[str, Any]) -> StepInputs:
        """The inputs among the arguments of a decode step, ``call`` by name.

        Tensors that describe the prompt's clips (sizes, masks of features) are left out: new tokens are text.
        """
        rest = {
            k: v for k, v in call.items() if k not in ("input_ids", "position_ids", "attention_mask", "return_dict")
        }
        batch = call["input_ids"].shape[0]
        return cls(
            call["position_ids"],
            {k: v for k, v in rest.items() if isinstance(v, torch.Tensor) and v.shape == (batch, 1)},
            {k: v for k, v in rest.items() if v is None or isinstance(v, (bool, int, float, str))},
        )

    @property
    def key(self) -> tuple:
        shapes = tuple((name, tensor.dtype) for name, tensor in sorted(self.tensors.items()))
        return tuple(self.positions.shape), self.positions.dtype, shapes, tuple(sorted(self.options.items(), key=str))


@dataclasses.dataclass(frozen=True)
class CaptureSite:
    """Where the graphs of a device are captured.

    Args:
        memory: the pool of intermediate results. All graphs share it, because no two run at the same time.
        stream: all graphs share it, because libraries keep a workspace per stream. The first launches on it are not
            captured, so that these workspaces do not lie in ``memory``.
        left: an event behind the last replay of a call; the next call waits for it.
    """

    memory: Any
    stream: torch.cuda.Stream
    left: torch.cuda.Event

    @classmethod
    def on(cls, device: torch.device) -> CaptureSite:
        return cls(torch.cuda.graph_pool_handle(), torch.cuda.Stream(device), torch.cuda.Event())

    def enter(self) -> None:
        """Makes the current stream wait for the previous call, which may have run on another stream."""
        torch.cuda.current_stream(self.stream.device).wait_event(self.left)

    def leave(self) -> None:
        self.left.record(torch.cuda.current_stream(self.stream.device))


class StaticStep:
    """The buffers of a decode step of one shape, and the graph captured over them.

    Attributes:
        pools: by layer, the K and V pools that the step reads and writes.
        tokens: [batch, 1] int64, the tokens that the next `run` feeds.
        logits: [batch, vocabulary], what the last `run` gave, in the model's dtype; None before the first.
        positions: [..., batch or 1, 1] int64, those of the next step.
        key: what the store finds the step by.
        graph: the captured graph, None where the step is run launch by launch.
        why_no_graph: the reason for that.
    """

    def __init__(self, model: nn.Module, session: Session, state: BranchedState, tables: tuple) -> None:
        self.model = model
        self.session = session
        first = state.layers[0].keys
        self.device = first.device
        with torch.inference_mode(False):  # else they could not be changed outside of inference mode
            self.pools = [_pools_like(layer, tables) for layer in state.layers]
            self.tokens = torch.zeros((state.batch, 1), dtype=torch.int64, device=self.device)
        self.logits: torch.Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.why_no_graph = "" if self.has_graphs(self.device) else f"there are none on {self.device.type}"
        self.call: Call | None = None
        self.key: tuple = ()

    @staticmethod
    def has_graphs(device: torch.device) -> bool:
        return device.type == "cuda"

    def load(self, call: Call, inputs: StepInputs) -> None:
        """Fills the buffers for a first step; ``call`` plans one text position for every sample."""
        plan = call.plan
        if self.call is None:
            self.call = dataclasses.replace(call)
            if call.home_weights is not None:
                with torch.inference_mode(False):  # the step's own, read by its graph
                    self.call.home_weights = torch.empty_like(call.home_weights)
            self._numbers = plan.tensors.keep_on(self.device)
            with torch.inference_mode(False):
                self._growth = growth_of(plan).to(self.device)
                self.positions = torch.empty_like(inputs.positions, memory_format=torch.contiguous_format)
                self._tensors = {name: torch.empty_like(tensor) for name, tensor in inputs.tensors.items()}
        else:
            self._numbers.copy_(plan.tensors.host)
        if call.home_weights is not None:
            self.call.home_weights.copy_(call.home_weights)
        self.positions.copy_(inputs.positions)
        for name, tensor in inputs.tensors.items():
            self._tensors[name].copy_(tensor)
        self._options = inputs.options

    def run(self, cache: Cache) -> torch.Tensor:
        """Feeds ``tokens`` and advances the buffers by one position; returns `logits`, which the next run overwrites.

        ``cache`` is the one whose keys lie in `pools`.
        """
        if self.graph is not None:
            self.graph.replay()
        else:
            self._launch(cache)
        return self.logits

    def capture(self, cache: Cache, site: CaptureSite) -> None:
        """Captures the graph at ``site``.

        Changes what the buffers and the first slots hold: the caller loads again. A step that cannot be captured is run
        launch by launch from then on, and ``why_no_graph`` says so.
        """
        try:
            self.graph = self._record(cache, site)
        except RuntimeError as error:
            self.why_no_graph = f"the capture failed: {' '.join(str(error).split())}"
            name = type(self.model).__name__
            logger.warning("fmd_ext: decode steps of %s run without a CUDA graph: %s", name, self.why_no_graph)

    def _record(self, cache: Cache, site: CaptureSite) -> torch.cuda.CUDAGraph:
        current = torch.cuda.current_stream(self.device)
        site.stream.wait_stream(current)
        try:
            # Entered here too: after a capture that fails, torch.cuda.graph leaves its stream the current one.
            with torch.cuda.stream(site.stream):
                self._launch(cache)  # libraries allocate workspaces in their first call, which must not be captured
                self._advance(-1)  # the pools may have room for one position only
                self._refuse_waits(cache)
                graph = torch.cuda.CUDAGraph()
                # Other threads may use CUDA during the capture, for instance to decode a clip into pinned memory.
                mode = "thread_local"
                with torch.cuda.graph(graph, pool=site.memory, stream=site.stream, capture_error_mode=mode):
                    self._launch(cache)
        finally:
            current.wait_stream(site.stream)
        return graph

    def _refuse_waits(self, cache: Cache) -> None:
        """Raises RuntimeError where the step makes the host wait for the device, which no graph can capture.

        Looked for before the capture: one that fails leaves torch's allocator and random generator in disorder.
        """
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self._launch(cache)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for warning in caught:
            if "called a synchronizing CUDA operation" in str(warning.message):
                raise RuntimeError(f"{warning.filename}, line {warning.lineno}, makes the host wait for the device")

    def _launch(self, cache: Cache) -> None:
        given = {**self._tensors, **self._options, "input_ids": self.tokens, "position_ids": self.positions}
        with self.session.running(self.call):
            out = self.model(**given, **cache_kwargs(cache), return_dict=True)
        logits = out.logits[:, -1]
        if self.logits is None:
            with torch.inference_mode(False):
                self.logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        self.logits.copy_(logits)
        self._advance(1)

    def _advance(self, steps: int) -> None:
        self._numbers.add_(self._growth, alpha=steps)
        self.positions.add_(steps)


def _pools_like(layer: Any, tables: tuple) -> Pools:
    num_slots = tables[layer.layer_idx >= layer.state.fork_layers].num_slots

    def empty(pool: torch.Tensor) -> torch.Tensor:
        return torch.empty((pool.shape[0], num_slots, pool.shape[2]), dtype=layer.dtype, device=layer.device)

    return empty(layer.keys), empty(layer.values)

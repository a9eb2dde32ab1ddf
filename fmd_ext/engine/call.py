"""One forward call of a patched decoder: its frozen plan, and what is decided while the layers run.

A call is made per forward and reached as ``session.call``: by the merge, the cache and the fusions alike. Attention
functions receive it as an argument, because their module may be a copy without a session. Nobody writes into the plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from fmd_ext.engine.plan import LayerPlan, Plan
from fmd_ext.engine.routes import Routes


class Observer(Protocol):
    """Looks at the attention of a call's fork layers and chooses settings from it; see `fmd_ext.engine.auto`."""

    def observe(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        """One fork layer: query rows [rows, num_qo_heads, head_dim] and keys [num_kv_heads, num_slots, head_dim]."""

    def ends_fork(self) -> bool:
        """Whether the layers observed so far are all that is forked."""

    def home_weights(self, weights: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor | None:
        """Home row weights [batch, 4] of the merge, from the settings' ``weights`` [4] and those of earlier calls."""


class Rotation(NamedTuple):
    """The rotation of queries and keys of one layer, deferred to the append op.

    Args:
        query: [1, num_qo_heads, rows, head_dim], what the attention function will be given: ``q_out`` in this layout.
        q: [rows, num_qo_heads, head_dim], not rotated.
        q_out: the same shape; the append writes the rotated queries here.
        k: [1, num_kv_heads, rows, head_dim], not rotated: the tensor that the cache's ``update`` receives.
        cos, sin: [rows, head_dim].
    """

    query: torch.Tensor
    q: torch.Tensor
    q_out: torch.Tensor
    k: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


@dataclasses.dataclass
class Call:
    """A forward call.

    Args:
        plan: its rows.
        fork_layers: number of layers before the merge; its upper bound while ``observer`` may still end the fork.
        home_weights: float32 [batch, 4], home row weights of the merge by sample and label, where they differ between
            samples; else None.
        observer: chooses the settings that are "auto"; None where none is, or where no sample begins to fork.
        routes: what its samples' questions need, where this call is the first to be told.
        rotation: the deferred rotation of the layer that is running; else None.
        rotated: the last one that the append has done.
        shared: what layers make of arguments that they are all given, by name: the argument, and what was made of it.
    """

    plan: Plan
    fork_layers: int
    home_weights: torch.Tensor | None = None
    observer: Observer | None = None
    routes: Routes | None = None
    rotation: Rotation | None = None
    rotated: Rotation | None = None
    shared: dict[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)

    def layer_plan(self, layer_idx: int) -> LayerPlan:
        """The attention of a layer."""
        return self.plan.fork if self.is_forked(layer_idx) else self.plan.trunk

    def is_forked(self, layer_idx: int) -> bool:
        return layer_idx < self.fork_layers

    def reaches_merge(self, layer_idx: int) -> bool:
        """Whether layer ``layer_idx`` comes after the merge. The number of layers stands for the final norm."""
        if self.observer is not None and self.is_forked(layer_idx) and self.observer.ends_fork():
            self.fork_layers = layer_idx
        return not self.is_forked(layer_idx)

    def once(self, name: str, given: Any, make: Callable[..., Any], *more: Any) -> Any:
        """``make(given, *more)``, made once as long as the layers are given the same object."""
        held = self.shared.get(name)
        if held is None or held[0] is not given:
            held = self.shared[name] = (given, make(given, *more))
        return held[1]

    def close(self) -> None:
        """Drops what was kept for the layers, which may be as long as the prompt."""
        self.rotation = self.rotated = None
        self.shared.clear()

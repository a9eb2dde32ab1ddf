"""Adapters of PEFT that read samples or positions off the shape of a layer's input, which packed rows do not have."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fmd_ext.engine.session import Session

# PEFT 0.21 hands these arguments to a layer's adapters for one call, bound in a forward pre-hook.
PER_SAMPLE = "adapter_names"
REFUSED = {
    "alora_offsets": "an aLoRA adapter, which counts positions from the end of a sample",
    "scalings": "X-LoRA, which weighs its adapters by sample and position",
    "task_ids": "Poly, which mixes its adapters by sample",
}
# Tuners (packages below peft.tuners) whose modules count or mix rows in every call.
REFUSED_TUNERS = {
    "lily": "Lily, which mixes its adapters by the mean over all rows of a call",
    "shadow": "ShadowPEFT, which carries a second sequence through the layers",
}


class RowCounters:
    """Finds such adapters in a decoder's layers. Modules of PEFT are looked up once per prompt."""

    def __init__(self, session: Session, decoder: nn.Module) -> None:
        self.session = session
        self.decoder = decoder
        self._adapters: list[nn.Module] | None = None

    def served(self, is_prompt: bool) -> contextlib.AbstractContextManager:
        """The context of a decoder's call. Adapters chosen per sample (``adapter_names``) get one name per row, and
        a layer's input in which every row is a sample.

        Raises ValueError where another adapter that counts samples or positions is active.
        """
        if is_prompt or self._adapters is None:
            own = (module for part in (*self.decoder.layers, self.decoder.norm) for module in part.modules())
            self._adapters = [module for module in own if type(module).__module__.startswith("peft.")]
        by_sample = []
        for module in self._adapters:
            tuner = type(module).__module__.split(".")[2:3]
            if tuner and tuner[0] in REFUSED_TUNERS and not getattr(module, "disable_adapters", False):
                _refuse(f"has {REFUSED_TUNERS[tuner[0]]}, in")
            names = {name for hook in module._forward_pre_hooks.values() for name in _bound(hook)}
            for name in names & REFUSED.keys():
                _refuse(f"brings {name} ({REFUSED[name]}) to")
            if PER_SAMPLE in names:
                by_sample.append(module)
        return self._by_row(by_sample) if by_sample else contextlib.nullcontext()

    @contextlib.contextmanager
    def _by_row(self, modules: list[nn.Module]) -> Iterator[None]:
        hooks = []
        try:
            for module in modules:
                hooks.append(module.register_forward_pre_hook(self._unpack, with_kwargs=True))
                hooks.append(module.register_forward_hook(_pack))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _unpack(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """[1, rows, features] and names by sample -> [rows, 1, features] and names by row."""
        names = kwargs.get(PER_SAMPLE)
        if not args or args[0].dim() != 3 or names is None or self.session.call is None:
            return None
        plan = self.session.call.plan
        if len(names) != plan.batch:
            raise ValueError(f"adapter_names are for {len(names)} samples, the call has {plan.batch}")
        samples = plan.positions[: args[0].shape[1]] // plan.length
        return (args[0].transpose(0, 1), *args[1:]), {**kwargs, PER_SAMPLE: [names[i] for i in samples]}


def _refuse(what: str) -> None:
    raise ValueError(
        f"this call {what} the decoder's layers, where a patched model has the rows of all samples in one sequence; "
        "accepted are adapters that treat all rows alike (LoRA, IA3, OFT, …) and adapter_names; or unpatch the model "
        "for such calls"
    )


def _pack(module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
    return out.transpose(0, 1) if out.dim() == 3 else out


def _bound(hook: Any) -> tuple[str, ...]:
    """Names of the arguments that are bound in a hook of PEFT."""
    if isinstance(hook, functools.partial):
        return tuple(hook.keywords)
    return getattr(getattr(hook, "__code__", None), "co_freevars", ())

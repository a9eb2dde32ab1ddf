"""`patch` and `unpatch`: fork-merge decoding on a model instance, and off again without a trace."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import types
from typing import Any

from torch import nn

from fmd_ext.adapters import Adapter, find_adapter
from fmd_ext.config import AUTO, FMDConfig
from fmd_ext.decode import DecodeRunner
from fmd_ext.engine.forward import ForkedDecoder, MergeHook, branched_config, refuse_unsupported
from fmd_ext.engine.plan import StepPlan
from fmd_ext.engine.session import Session
from fmd_ext.ops import dispatch
from fmd_ext.patching.deepstack import PackedDeepstack
from fmd_ext.patching.entry import EntryForward, EntryGenerate, ReadLabels
from fmd_ext.patching.fusions.norms import FusedNorm, is_plain
from fmd_ext.patching.fusions.rotary import FusedRotation, why_not_fused

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_fmd_handle"
_OVERRIDES = "_fmd_overrides"


class Handle:
    """A patched model's settings and state; returned by `patch`.

    Attributes:
        config: the resolved `FMDConfig` in force.
        adapter: the `Adapter` that serves the model.
        runner: the `DecodeRunner`; its ``last`` tells what the last ``generate`` call's decode steps ran on, and why.
        why_not_fused: why the model's own code rotates queries and keys; empty where the append does it.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, config: FMDConfig, runner: bool | None) -> None:
        self.model = model
        self.adapter = adapter
        self.config = config
        self.entry = adapter.find_entry(model)
        self.decoder = adapter.find_decoder(model)
        self.session = Session(config)
        self.runner = DecodeRunner(self.session, self.decoder, runner)
        self.why_not_fused = "the decoder runs as it is"
        self._restore: list[tuple[nn.Module, str, Any, Any]] = []  # module, attribute, what was there, what is
        self._hooks: list[Any] = []
        self._claims = 0  # calls of `patch` that have returned this handle, less the blocks that have ended

    def __repr__(self) -> str:
        return f"fmd_ext.Handle({type(self.model).__name__}, {self.adapter.name}, {self.config})"

    @property
    def is_in_force(self) -> bool:
        """Whether the model is patched, and by this patch."""
        return handle_of(self.model) is self

    def unpatch(self) -> None:
        """Restores the model as it was before. Raises ValueError when this patch is not in force."""
        if not self.is_in_force:
            raise ValueError(f"this patch of {type(self.model).__name__} is not in force any more")
        self.remove()

    def __enter__(self) -> Handle:
        if not self.is_in_force:
            raise ValueError(f"this patch of {type(self.model).__name__} is not in force any more: patch it again")
        return self

    def __exit__(self, *exception: object) -> None:
        """``with patch(model): ...`` unpatches at the end, unless the model was patched like that before the block."""
        self._claims -= 1
        if self._claims < 1 and self.is_in_force:
            self.remove()

    @property
    def last_plan(self) -> StepPlan | None:
        """The `StepPlan` of the decoder's last forward call; None before the first, and with 0 fork layers."""
        return self.session.last_plan

    @property
    def attention_runs_on(self) -> str:
        """The code that computes the decoder's attention: "kernel" or "torch", and why where there is a reason.

        "model": with 0 fork layers the model's own code runs.
        """
        if not (self.config.fork_layers or self.runner.wanted):
            return "model"
        path = dispatch.of_decoder(self.decoder)
        return f"{path.name}: {path.why}" if path.why else path.name

    def labels(self, modality_labels: Any) -> contextlib.AbstractContextManager:
        """A context in which the calls' positions carry ``modality_labels`` [batch, length].

        They are counted from the start of the sequence, cached positions included, as an attention mask is; positions
        past their end are text. When ``generate`` repeats samples (beams, several sequences), labels repeat with them.
        """
        return self.session.labels(modality_labels)

    # --- installation -------------------------------------------------------------------------------------------

    def install(self) -> None:
        try:
            if self.config.fork_layers or self.runner.wanted:
                self._install_decoder()
            if self.entry is not self.decoder:
                self._override(self.entry, "forward", EntryForward, self._read_labels(), self.adapter.branch_inputs)
            if hasattr(self.entry, "generate"):
                self._override(self.entry, "generate", EntryGenerate, self._read_labels(), self.runner)
            for module in {id(m): m for m in (self.model, self.entry)}.values():
                self._set(module, _ATTRIBUTE, self)
        except BaseException:
            self.remove()
            raise

    def _read_labels(self) -> ReadLabels | None:
        return functools.partial(self.adapter.labels_of, self.model) if self.adapter.sources else None

    def _install_decoder(self) -> None:
        decoder = self.decoder
        refuse_unsupported(decoder, self.adapter)
        self._override(decoder, "forward", ForkedDecoder, self.adapter.embed)
        if hasattr(decoder, self.adapter.deepstack):
            self._override(decoder, self.adapter.deepstack, PackedDeepstack)
        attention = [getattr(layer, self.adapter.attention) for layer in decoder.layers]
        for module in (decoder, *attention):
            self._set(module, "config", branched_config(module.config))
        reasons = [why_not_fused(module, self.adapter.rotary) for module in attention]
        self.why_not_fused = next(filter(None, reasons), "")
        for module, reason in zip(attention, reasons, strict=True):
            if not reason:
                self._override(module, "forward", FusedRotation, self.adapter.rotary)
        for module in (m for part in (*decoder.layers, decoder.norm) for m in part.modules() if is_plain(m)):
            self._override(module, "forward", FusedNorm)
        first = 1 if self.config.fork_layers == AUTO else self.config.fork_layers
        for index, module in list(enumerate((*decoder.layers, decoder.norm)))[first:]:
            hook = MergeHook(self.session, index)
            self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        lost = [f"{name} of {type(m).__name__}" for m, name, _, ours in self._restore if _is_replaced(m, name, ours)]
        if lost:
            logger.warning(
                "fmd_ext: unpatching also drops what has replaced our methods since the patch, such as a hook or a "
                "compiled function: %s%s; set it up again",
                ", ".join(lost[:3]),
                f" and {len(lost) - 3} more" if len(lost) > 3 else "",
            )
        for module, name, value, _ in reversed(self._restore):
            if value is _Absent:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value
        self._hooks, self._restore = [], []
        self.runner.forget()

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        self._restore.append((module, name, module.__dict__.get(name, _Absent), value))
        # Past nn.Module.__setattr__, which would take a handle's modules for children.
        module.__dict__[name] = value

    def _override(self, module: nn.Module, name: str, factory: Any, *more: Any) -> None:
        """Puts a method of the same signature on the instance, never on the class."""
        original = getattr(module, name)
        overrides = module.__dict__.get(_OVERRIDES)
        if overrides is None:
            overrides = {}
            self._set(module, _OVERRIDES, overrides)
        overrides[name] = factory(self.session, original, *more)

        # Looked up through the module, so that a deep copy of a patched model runs its own replacement.
        def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.__dict__[_OVERRIDES][name](self, *args, **kwargs)

        method.__name__ = name
        method.__doc__ = getattr(original, "__doc__", None)
        signature = inspect.signature(original)  # transformers inspects that of forward
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        method.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])
        self._set(module, name, types.MethodType(method, module))


def _is_replaced(module: nn.Module, name: str, ours: Any) -> bool:
    return isinstance(ours, types.MethodType) and module.__dict__.get(name) is not ours


class _Absent:
    """Stands for an attribute that the instance did not have."""


def patch(
    model: nn.Module,
    config: FMDConfig | None = None,
    *,
    adapter: str | Adapter | None = None,
    runner: bool | None = None,
    **overrides: Any,
) -> Handle:
    """Switches fork-merge decoding on for ``model`` (this instance only).

    Args:
        model: a supported transformers model: see ``fmd_ext.adapters.ADAPTERS``. The full Qwen2.5-Omni is patched in
            its thinker.
        config: settings; fields left at None take the model's defaults.
        adapter: an adapter or its name, where the model's own type does not say. ``"text"`` serves any Llama- or
            Qwen-like decoder; labels are then passed as ``modality_labels`` to ``forward`` or ``generate``, and
            ``branch_embeds`` beside ``inputs_embeds`` where labels say that positions are joint.
        runner: whether ``generate`` decodes over static buffers, on CUDA by replaying a captured graph. Default: on
            CUDA, with ``fork_layers`` above 0. True: on any device, and with 0 fork layers too, which then run on
            fmd_ext's attention. A call that cannot be run so takes the usual path, with one warning that says why.
        **overrides: fields of `FMDConfig` that replace those of ``config``.

    Returns:
        A `Handle`, also a context that unpatches at its end. Patching again with equal settings returns the handle in
        force, and a block around that leaves the model as it was before the block: patched.

    Raises:
        TypeError: an unsupported model, or a setting of the wrong type.
        ValueError: a setting out of range, or a model that is patched already with other settings. The model is left
            as it was.
    """
    if config is not None and not isinstance(config, FMDConfig):
        raise TypeError(f"config must be an FMDConfig, got {config!r}; single settings are given by name: alpha=0.8")
    if runner not in (None, True, False):
        raise TypeError(f"runner must be True, False or None, got {runner!r}")
    chosen = find_adapter(model, adapter)
    decoder = chosen.find_decoder(model)
    resolved = (config or FMDConfig()).replace(**overrides).resolve(chosen.defaults, len(decoder.layers))
    if chosen.branch_inputs and resolved.masking == "attention" and resolved.fork_layers:
        raise ValueError(
            f"{chosen.name} mixes video and audio in every audio-visual embedding, so masking='attention' has no "
            "position to leave out of a branch; use masking='zero', which masks a modality before the two are mixed"
        )
    current = handle_of(model)
    if current is not None:
        if (current.config, current.adapter, current.runner.wanted) == (resolved, chosen, runner):
            current._claims += 1
            return current
        also = "" if current.config != resolved else f", {current.adapter.name} and runner={current.runner.wanted}"
        raise ValueError(f"the model is patched already, with {current.config}{also}; unpatch it first")
    handle = Handle(model, chosen, resolved, runner)
    handle.install()
    handle._claims = 1
    return handle


def unpatch(model: nn.Module) -> None:
    """Restores the model as it was before `patch`. Raises ValueError when it is not patched."""
    handle = handle_of(model)
    if handle is None:
        raise ValueError(f"this {type(model).__name__} is not patched")
    handle.remove()


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of a patched model, of the full model or of its patched part; None when it is not patched."""
    own = model.__dict__.get(_ATTRIBUTE)
    if own is not None:
        return own
    parts = (module.__dict__.get(_ATTRIBUTE) for module in model.modules())
    return next((handle for handle in parts if handle is not None), None)

"""`patch` and `unpatch`: fork-merge decoding on a model instance, and off again without a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from fmd_ext.adapters import Adapter, find_adapter
from fmd_ext.config import AUTO, FMDConfig
from fmd_ext.decode import DecodeRunner
from fmd_ext.engine.auto import OpenCall
from fmd_ext.engine.call import Call
from fmd_ext.engine.forward import ForkedDecoder, MergeHook
from fmd_ext.engine.routes import Routes
from fmd_ext.engine.session import Session
from fmd_ext.ops import dispatch
from fmd_ext.patching.branched_config import BranchedConfig
from fmd_ext.patching.deepstack import PackedDeepstack
from fmd_ext.patching.entry import EntryForward, EntryGenerate
from fmd_ext.patching.fusions.kept_logits import KeptLogits
from fmd_ext.patching.fusions.put_on import Fusion, none_on, put_on
from fmd_ext.patching.installation import Installation, no_context
from fmd_ext.patching.labelling import LabelReader, cached
from fmd_ext.patching.refusals import attention_modules, refuse_unsupported
from fmd_ext.patching.routing import Asking, Router
from fmd_ext.patching.row_counters import RowCounters

_ATTRIBUTE = "_fmd_handle"


class Handle:
    """A patched model's settings and state; returned by `patch`.

    Attributes:
        config: the resolved `FMDConfig` in force.
        adapter: the `Adapter` that serves the model.
        runner: the `DecodeRunner`; its ``last`` tells what the last ``generate`` call's decode steps ran on, and why.
        fusions: what runs as fewer, larger ops, by name: ``rotation`` (within the append), ``norms``, ``qkv`` and
            ``gate_up`` (linears as one product), ``windows`` (attention of encoders), ``mlp_chunks`` (the MLPs of many
            rows, some at a time), ``kept_logits`` (those that ``generate`` reads, no others); each a `Fusion` that says
            where, and why not elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        config: FMDConfig,
        runner: bool | None,
        fusions: bool | None,
        router: Router | None,
    ) -> None:
        self.model = model
        self.adapter = adapter
        self.config = config
        self.entry = adapter.find_entry(model)
        self.decoder = adapter.find_decoder(model)
        chooses = AUTO in (config.alpha, config.fork_layers)
        self.session = Session(config, OpenCall(config, len(self.decoder.layers)) if chooses else None)
        self.runner = DecodeRunner(self.session, self.decoder, runner)
        self.router = router
        self._asking = None if router is None else Asking(self.session, self.entry, self.decoder, router)
        self.wants_fusions = fusions
        self.fusions: dict[str, Fusion] = none_on("the decoder runs as it is")
        self._kept = KeptLogits()
        self.installation = Installation(self.session)
        self.row_counters = RowCounters(self.session, self.decoder)
        self._claims = 0  # number of `patch` calls that returned this handle, minus the `with` blocks that have ended

    def __repr__(self) -> str:
        return f"fmd_ext.Handle({type(self.model).__name__}, {self.adapter.name}, {self.config})"

    @property
    def is_in_force(self) -> bool:
        """Whether the model's calls run this patch: it is on, and nothing has replaced its methods or modules."""
        if handle_of(self.model) is not self or self.installation.replaced:
            return False
        if self.adapter.find_decoder(self.model) is not self.decoder:
            return False
        return not (self.config.fork_layers or self.runner.wanted) or not self._other_attention()

    @property
    def asked_for(self) -> tuple[FMDConfig, Adapter, bool | None, bool | None]:
        """What `patch` was given, settings resolved."""
        return self.config, self.adapter, self.runner.wanted, self.wants_fusions

    @property
    def _is_on(self) -> bool:
        return handle_of(self.model) is self

    def unpatch(self) -> None:
        """Restores the model as it was before. Raises ValueError when this patch is not in force."""
        if not self._is_on:
            raise ValueError(f"this patch of {type(self.model).__name__} is not in force any more")
        self.remove()

    def __enter__(self) -> Handle:
        if not self.is_in_force:
            raise ValueError(f"this patch of {type(self.model).__name__} is not in force any more: patch it again")
        return self

    def __exit__(self, *exception: object) -> None:
        """``with patch(model): ...`` unpatches at the end, unless the model was patched like that before the block."""
        self._claims -= 1
        if self._claims < 1 and self._is_on:
            self.remove()

    @property
    def last_call(self) -> Call | None:
        """The decoder's last forward call that succeeded; None before the first, and with 0 fork layers."""
        return self.session.last_call

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
        past their end are text (words after a prompt), where the call brings ids: embeddings must not go on past it.
        When ``generate`` repeats samples (beams, several sequences), labels repeat with them.
        """
        return self.session.labels(modality_labels)

    def routed(self, routes: Routes) -> contextlib.AbstractContextManager:
        """A context in which the samples of all calls have ``routes``, given by hand: nothing is asked.

        Who forks is decided by the first call on a cache, weights by each call. Any ``text_weight`` of the settings
        gives way to them. When ``generate`` repeats samples, routes repeat with them.
        """
        return self.session.routed(routes)

    def routes(self, questions: Sequence[str]) -> Routes:
        """What ``questions`` need, as prompts with these questions would be routed.

        Raises ValueError where ``text_weight`` is not "auto".
        """
        if self._asking is None:
            raise ValueError(
                f"nothing is asked with text_weight={self.config.text_weight}; patch with text_weight='auto'"
            )
        with self.session.lock:
            return self._asking.routes(questions)

    @property
    def last_routes(self) -> Routes | None:
        """Those of the last prompt; None where nothing was asked."""
        return None if self._asking is None else self._asking.last

    # --- installation -------------------------------------------------------------------------------------------

    def install(self) -> None:
        put, labels = self.installation, LabelReader(self.adapter, self.model)
        labels = labels if self.adapter.sources else None
        with self.session.lock:
            try:
                if self.config.fork_layers or self.runner.wanted:
                    self._install_decoder()
                if self.entry is not self.decoder:
                    put.override(
                        self.entry,
                        "forward",
                        EntryForward,
                        labels,
                        self._asking,
                        self.adapter.branch_inputs,
                        self._kept,
                        context=no_context,
                    )
                if hasattr(self.entry, "generate"):
                    more = labels, self._asking, self.runner
                    put.override(self.entry, "generate", EntryGenerate, *more, context=no_context)
                for module in {id(m): m for m in (self.model, self.entry, self.decoder)}.values():
                    put.refuse_replicas(module)
                for module in {id(m): m for m in (self.model, self.entry)}.values():
                    put.set(module, _ATTRIBUTE, self)
            except BaseException:
                self.remove()
                raise

    def _install_decoder(self) -> None:
        decoder, put = self.decoder, self.installation
        refuse_unsupported(decoder, self.adapter)
        put.override(decoder, "forward", ForkedDecoder, self.adapter.embed, context=self._decoder_call)
        if hasattr(decoder, self.adapter.deepstack):
            put.override(decoder, self.adapter.deepstack, PackedDeepstack)
        for module in (decoder, *(m for layer in decoder.layers for m in attention_modules(layer, self.adapter))):
            put.branch_config(module)
        self.fusions = put_on(put, self.entry, decoder, self.adapter, self.wants_fusions, self._kept)
        first = self.config.fork_layers if isinstance(self.config.fork_layers, int) else 1  # auto forks at least one
        for index, module in list(enumerate((*decoder.layers, decoder.norm)))[first:]:
            put.pre_hook(module, MergeHook(self.session, index))

    def _decoder_call(self, call: dict[str, Any]) -> contextlib.AbstractContextManager:
        is_prompt = not cached(call)
        if is_prompt and (name := self._other_attention()):
            raise RuntimeError(
                f"the attention module of {name} was put in after fmd_ext.patch, which it does not run by: unpatch the "
                "model and patch it again"
            )
        return self.row_counters.served(is_prompt)

    def _other_attention(self) -> str:
        """The first layer with an attention module that the patch does not know; "" without any."""
        for index, layer in enumerate(self.decoder.layers):
            modules = attention_modules(layer, self.adapter)
            if not modules or not all(isinstance(module.config, BranchedConfig) for module in modules):
                return f"layer {index}"
        return ""

    def remove(self) -> None:
        """Takes the patch off, once the calls of other threads are done."""
        with self.session.lock:
            self.installation.remove(self.model, self.decoder)
            self.runner.forget()


def patch(
    model: nn.Module,
    config: FMDConfig | None = None,
    *,
    adapter: str | Adapter | None = None,
    processor: Any = None,
    runner: bool | None = None,
    fusions: bool | None = None,
    **overrides: Any,
) -> Handle:
    """Switches fork-merge decoding on for ``model`` (this instance only).

    Until `unpatch`, the decoder's attention modules read the ``attn_implementation`` ``"fmd_ext"``, whatever the model
    was loaded with; the model's own config keeps its own, and so do encoders without the fusion ``windows``.

    Args:
        model: a supported transformers model: see ``fmd_ext.adapters.ADAPTERS``. The full Qwen2.5-Omni is patched in
            its thinker.
        config: settings; fields left at None take the model's defaults.
        adapter: an adapter or its name, where the model's own type does not say. ``"text"`` serves any Llama- or
            Qwen-like decoder; labels are then passed as ``modality_labels`` to ``forward`` or ``generate``, and
            ``branch_embeds`` beside ``inputs_embeds`` where labels say that positions are joint.
        processor: the model's processor, or a `Router` made of one. ``text_weight="auto"`` needs it, to read questions
            and to ask the model about them.
        runner: whether ``generate`` decodes over static buffers, on CUDA by replaying a captured graph. Default: on
            CUDA, with ``fork_layers`` above 0. True: on any device, and with 0 fork layers too, which then run on
            fmd_ext's attention. A call that cannot be run so takes the usual path, with one warning that says why.
        fusions: whether parts of decoder and encoders run as fewer, larger ops, with the same results up to rounding.
            Default: those that are not slower on the device. True: all. False: none. ``handle.fusions`` says which.
        **overrides: fields of `FMDConfig` that replace those of ``config``.

    Returns:
        A `Handle`, also a context that unpatches at its end. Patching again with equal settings returns the handle in
        force, and a block around that leaves the model as it was before the block: patched.

    Raises:
        TypeError: an unsupported model, a setting of the wrong type, or ``text_weight="auto"`` without a processor.
        ValueError: a setting out of range, or a model that is patched already with other settings. The model is left
            as it was.
    """
    if config is not None and not isinstance(config, FMDConfig):
        raise TypeError(f"config must be an FMDConfig, got {config!r}; single settings are given by name: alpha=0.8")
    if runner not in (None, True, False):
        raise TypeError(f"runner must be True, False or None, got {runner!r}")
    if fusions not in (None, True, False):
        raise TypeError(f"fusions must be True, False or None, got {fusions!r}")
    chosen = find_adapter(model, adapter)
    decoder = chosen.find_decoder(model)
    resolved = (config or FMDConfig()).replace(**overrides).resolve(chosen.defaults, len(decoder.layers))
    if chosen.branch_inputs and resolved.masking == "attention" and resolved.fork_layers:
        raise ValueError(
            f"{chosen.name} mixes video and audio in every audio-visual embedding, so masking='attention' has no "
            "position to leave out of a branch; use masking='zero', which masks a modality before the two are mixed"
        )
    router = _router_for(resolved, processor)
    current = handle_of(model)
    if current is not None:
        if not current.is_in_force:
            raise ValueError(
                "the model was patched, and parts of the patch have been replaced since, as by a library that puts its "
                "own forward on modules; unpatch it first"
            )
        same = current.asked_for == (resolved, chosen, runner, fusions)
        if same and (router is None or router == current.router):
            current._claims += 1
            return current
        also = ""
        if current.config == resolved:
            also = f", {current.adapter.name}, runner={current.runner.wanted} and fusions={current.wants_fusions}"
        raise ValueError(f"the model is patched already, with {current.config}{also}; unpatch it first")
    handle = Handle(model, chosen, resolved, runner, fusions, router)
    handle.install()
    handle._claims = 1
    return handle


def _router_for(config: FMDConfig, processor: Any) -> Router | None:
    if not config.asks or not config.fork_layers:
        return None
    if processor is None:
        raise TypeError(
            "text_weight='auto' asks the model what each question needs, and reads and writes text by the model's "
            "processor: patch(model, text_weight='auto', processor=processor)"
        )
    return processor if isinstance(processor, Router) else Router(processor)


def unpatch(model: nn.Module) -> None:
    """Restores the model as it was before `patch`, after the calls of other threads that run.

    Raises ValueError when it is not patched.
    """
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

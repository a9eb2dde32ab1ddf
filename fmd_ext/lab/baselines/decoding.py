"""What the baselines share: they see every forward call, may run the model again on a cache of its own, and change
the last position's logits.

A run that is not needed at a step only notes the call and catches up, in one call, when it is.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fmd_ext.adapters import PADDING, find_adapter
from fmd_ext.compat import cache_argument, cache_name, cache_of
from fmd_ext.config import MODALITIES
from fmd_ext.engine.forward import arguments_by_name
from fmd_ext.lab.baselines.prompts import Prompt, joined
from fmd_ext.lab.interception import intercepting
from fmd_ext.patching.handle import handle_of

# Some samples of a batch, and the arguments of a prompt of theirs.
Part = tuple[list[int], dict[str, Any]]

_IN_FORCE = "_fmd_baseline"
GROWING = ("input_ids", "position_ids", "cache_position")  # arguments of a decode step, one entry per new position


class Run:
    """A second run of the model beside the plain one, on its own cache.

    Attributes:
        name: what is different in it.
        prompt: its own one, where it has another than the plain run.
        hidden: layer -> bool [batch, heads, prompt length]: positions that nobody attends to in this run.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.cache = DynamicCache()
        self.prompt: Prompt | None = None
        self.waiting: list[dict[str, Any]] = []
        self.hidden: dict[int, Tensor] = {}

    def add(self, call: dict[str, Any], own: dict[str, Any]) -> None:
        """Notes a call of the plain run, and the arguments of this one for it."""
        if own.get("input_ids") is not call.get("input_ids"):
            self.prompt = Prompt(own, call["input_ids"].shape[1])
        self.waiting.append(own)

    def calls(self) -> Iterator[dict[str, Any]]:
        """The calls to catch up with, each to be run before the next: the prompt, if it has not run yet, then all later
        steps as one."""
        waiting, self.waiting = self.waiting, []
        started = self.cache.get_seq_length() > 0
        prompt, steps = ([], waiting) if started else (waiting[:1], waiting[1:])
        if len(steps) > 1:
            one = dict(steps[-1])  # its attention mask covers all
            for name in GROWING:
                if isinstance(one.get(name), Tensor):
                    one[name] = torch.cat([step[name] for step in steps], dim=-1)
            steps = [one]
        yield from prompt
        for step in steps:
            yield step if self.prompt is None else self.prompt.later(step)

    def running(self, decoder: nn.Module) -> contextlib.AbstractContextManager:
        """Around one of its calls."""
        starts = self.prompt is not None and self.cache.get_seq_length() == 0
        return self.prompt.running(decoder) if starts else contextlib.nullcontext()


class Sequence:
    """A batch that is being decoded: what was measured on its prompt, and its second runs.

    Attributes:
        labels: int8 [batch, prompt length] of -1 padding, 0 text, 1 visual, 2 audio; None where the method leaves the
            batch alone, as most do without any clip.
        runs: second runs by name.
        prompt: that of the plain run, where it is another than the caller's.
        length: positions that have been run, padding included.
        measured: what the method keeps of the prompt.
    """

    def __init__(self, labels: Tensor | None) -> None:
        self.labels = labels
        self.runs: dict[str, Run] = {}
        self.prompt: Prompt | None = None
        self.length = 0
        self.measured: Any = None

    def add_runs(self, *names: str) -> None:
        self.runs.update({name: Run(name) for name in names})


class Method:
    """A baseline; subclasses override what they change.

    Attributes:
        needs_clip: a batch without any clip is decoded plainly.
        notes: per sample of the last prompt what a report should say of it, kind to detail.
    """

    needs_clip = True

    def __init__(self) -> None:
        self.notes: list[dict[str, str]] = []

    def begin(self, sequence: Sequence, call: dict[str, Any]) -> None:
        """A prompt: ``sequence.add_runs`` if it needs any. ``call`` holds the arguments of forward by name."""

    def arguments(self, name: str, call: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the second run ``name`` for the same call.

        At a prompt they may be those of another prompt, as `prompts` makes them: of other ids, with a mask. The run
        then goes on from that prompt, and this is not called for later calls.
        """
        return call

    def instead(self, sequence: Sequence, call: dict[str, Any]) -> list[Part] | None:
        """At a prompt: other prompts that the plain run gets in its place, each for some samples, together for all."""
        return None

    def layer_input(self, sequence: Sequence, run: Run | None, layer: int, hidden: Tensor) -> None:
        """Sees the hidden states [batch, new positions, hidden size] that go into a decoder layer."""

    def attention(
        self, sequence: Sequence, run: Run | None, attend: Callable[..., Any], module: nn.Module, *args: Any, **kw: Any
    ) -> Any:
        """The attention function, as in `intercepting`, of the plain run (None) or of a second one."""
        query, key, value, mask, scale = args
        return attend(module, query, key, value, mask, scaling=scale, **kw)

    def logits(self, sequence: Sequence, plain: Tensor, second: Callable[[str], Tensor]) -> Tensor:
        """Logits [batch, vocabulary] from those of the plain run; ``second(name)`` gives those of a second run."""
        return plain


class _Forward:
    """Replacement of the entry module's forward."""

    def __init__(self, model: nn.Module, original: Callable[..., Any], method: Method) -> None:
        self.model = model
        self.adapter = find_adapter(model)
        self.decoder = self.adapter.find_decoder(model)
        self.original = original
        self.method = method
        self.signature = inspect.signature(original)
        self.cache_name = cache_argument(self.signature)
        entry = self.adapter.find_entry(model)
        self.rope_modules = [module for module in entry.modules() if "rope_deltas" in module.__dict__]
        self.sequences: weakref.WeakKeyDictionary[Any, Sequence] = weakref.WeakKeyDictionary()

    @torch.no_grad()
    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = arguments_by_name(self.signature, args, kwargs)
        cache = call.pop(self.cache_name, None)
        use_cache = call.pop("use_cache", None)
        sequence = self._sequence(call, cache)
        options = {name: call.pop(name) for name in list(call) if name.startswith(("output_", "return_"))}
        for name, run in sequence.runs.items():
            run.add(call, call if run.prompt else self.method.arguments(name, call))
        parts = None if sequence.length or sequence.labels is None else self.method.instead(sequence, call)
        if parts:
            out = self._in_parts(sequence, parts, call, options, cache, use_cache)
        else:
            plain = call if sequence.prompt is None else sequence.prompt.later(call)
            with self._observing(sequence, None):
                out = self.original(**plain, **options, **{self.cache_name: cache}, use_cache=use_cache)
        new = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
        sequence.length += new.shape[1]
        if (filled := cache_of(out)) is not None:
            self.sequences[filled] = sequence

        def second(name: str) -> Tensor:
            run = sequence.runs[name]
            with self._observing(sequence, run), self._rope_deltas_kept():
                for again in run.calls():
                    with run.running(self.decoder):
                        logits = self.original(**again, **{self.cache_name: run.cache}, use_cache=True).logits
            return logits[:, -1].float()

        plain = out.logits[:, -1].float()
        changed = out.logits.clone()
        changed[:, -1] = self.method.logits(sequence, plain, second)
        out.logits = changed
        return out

    def _sequence(self, call: dict[str, Any], cache: Any) -> Sequence:
        """What is known of the cache's batch; an empty cache, or none, begins a new one."""
        length = 0 if cache is None else cache.get_seq_length()
        ids = call.get("input_ids")
        labels = None if ids is None else self.adapter.labels_of(self.model, ids, call)
        if labels is None and not length and not self.method.needs_clip:
            given = ids if ids is not None else call["inputs_embeds"]
            labels = torch.zeros(given.shape[:2], dtype=torch.int8, device=given.device)
        if length:
            sequence = self.sequences.get(cache)
            if sequence is None or sequence.length != length:
                raise ValueError("a baseline can only go on with a cache that it has filled itself and nobody has cut")
            if labels is not None:
                raise ValueError("baselines take all clips in the first call on a cache")
            return sequence
        mask = call.get("attention_mask")
        if labels is not None and mask is not None:
            labels = labels.masked_fill(mask == 0, PADDING)
        sequence = Sequence(labels)
        if labels is not None:
            self.method.begin(sequence, call)
        return sequence

    def _in_parts(
        self,
        sequence: Sequence,
        parts: list[Part],
        call: dict[str, Any],
        options: dict[str, Any],
        cache: Any,
        use_cache: bool | None,
    ) -> Any:
        """The plain run of other prompts, each for some samples. The output has logits of the last position only."""
        asked = [name for name, value in options.items() if value and name.startswith("output_")]
        if asked:
            raise ValueError(
                f"the prompts in the place of the caller's have other lengths: leave {', '.join(asked)} unset"
            )
        batch, width = call["input_ids"].shape
        ran, logits = [], None
        for rows, own in parts:
            prompt, own_cache = Prompt(own, width), DynamicCache()
            with self._observing(sequence, None), prompt.running(self.decoder):
                out = self.original(**own, **options, **{self.cache_name: own_cache}, use_cache=True)
            if logits is None:
                logits = out.logits.new_empty(batch, 1, out.logits.shape[-1])
            logits[rows] = out.logits[:, -1:]
            ran.append((rows, prompt, own_cache))
        sequence.prompt, filled = joined(ran, width, DynamicCache() if cache is None else cache)
        for module in self.rope_modules:
            module.rope_deltas = sequence.prompt.rope_deltas
        out.logits = logits
        setattr(out, cache_name(), None if use_cache is False else filled)
        return out

    @contextlib.contextmanager
    def _rope_deltas_kept(self) -> Iterator[None]:
        """A model with M-RoPE keeps how far the last prompt's positions are from its indices."""
        kept = [module.rope_deltas for module in self.rope_modules]
        try:
            yield
        finally:
            for module, deltas in zip(self.rope_modules, kept, strict=True):
                module.rope_deltas = deltas

    @contextlib.contextmanager
    def _observing(self, sequence: Sequence, run: Run | None) -> Iterator[None]:
        """Within this context the method sees and changes what it overrides."""
        with contextlib.ExitStack() as stack:
            if sequence.labels is not None and type(self.method).attention is not Method.attention:
                attention = functools.partial(self.method.attention, sequence, run)
                stack.enter_context(intercepting(self.decoder, self.adapter.attention, attention))
            if sequence.labels is not None and type(self.method).layer_input is not Method.layer_input:
                for index, layer in enumerate(self.decoder.layers):
                    see = functools.partial(self._see, sequence, run, index)
                    stack.callback(layer.register_forward_pre_hook(see, with_kwargs=True).remove)
            yield

    def _see(
        self, sequence: Sequence, run: Run | None, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        self.method.layer_input(sequence, run, index, args[0] if args else kwargs["hidden_states"])


def method_of(model: nn.Module) -> Method | None:
    """The baseline that ``model`` decodes by, within its context."""
    return find_adapter(model).find_entry(model).__dict__.get(_IN_FORCE)


@contextlib.contextmanager
def applied(model: nn.Module, method: Method) -> Iterator[Method]:
    """Within this context ``model`` decodes by ``method``; afterwards it is as it was.

    Raises:
        ValueError: the model is patched.
        TypeError: a model that fmd_ext has no adapter for.
    """
    if handle_of(model) is not None:
        raise ValueError("a baseline decodes with the model as it is: unpatch it first")
    adapter = find_adapter(model)
    if not adapter.sources:
        raise TypeError(f"the adapter {adapter.name!r} does not say which tokens are video and audio")
    entry = adapter.find_entry(model)
    replaced = {
        "forward": _Forward(model, entry.forward, method),
        "generate": functools.partial(_generate, entry.generate),
    }
    before = {name: entry.__dict__.get(name) for name in (*replaced, _IN_FORCE)}
    try:
        for name, function in replaced.items():
            entry.__dict__[name] = _method_like(entry, getattr(entry, name), function)
        entry.__dict__[_IN_FORCE] = method
        yield method
    finally:
        for name, own in before.items():
            entry.__dict__.pop(name, None)
            if own is not None:
                entry.__dict__[name] = own


def _method_like(module: nn.Module, original: Any, function: Callable[..., Any]) -> types.MethodType:
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    # transformers inspects the signature of forward: without a place for encoded clips, generate hands over raw ones,
    # which can be noised.
    parameters = inspect.signature(original).parameters.values()
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__signature__ = inspect.Signature([first, *(p for p in parameters if p.name != "mm_encoder_outputs")])
    return types.MethodType(method, module)


def _generate(original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")
    config = given or module.generation_config
    refused = [name for name in ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")
               if kwargs.get(name, getattr(config, name, None))]  # fmt: skip
    refused += [name for name in ("num_beams", "num_return_sequences")
                if (kwargs.get(name, getattr(config, name)) or 1) > 1]  # fmt: skip
    if refused:
        raise ValueError(f"baselines decode greedily or by sampling, token by token; leave {', '.join(refused)} unset")
    return original(*args, **kwargs)


def plausible(contrasted: Tensor, plain: Tensor, beta: float) -> Tensor:
    """The adaptive plausibility constraint (arXiv 2210.15097): tokens whose plain probability is below ``beta`` times
    the largest get -inf. Both [batch, vocabulary]."""
    least = plain.max(-1, keepdim=True).values + (math.log(beta) if beta > 0 else -math.inf)
    return contrasted.masked_fill(plain < least, -math.inf)


def check_range(name: str, value: float, least: float, most: float = math.inf) -> None:
    """Raises TypeError unless it is a number, ValueError unless ``least <= value <= most``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not least <= value <= most:
        accepted = f"in [{least:g}, {most:g}]" if most < math.inf else f"{least:g} or more"
        raise ValueError(f"{name} must be {accepted}, got {value}")


def check_modalities(modalities: Iterable[str]) -> tuple[str, ...]:
    """Raises ValueError unless they are one or more of ``MODALITIES``."""
    chosen = () if isinstance(modalities, str) else tuple(modalities)
    if not chosen or not set(chosen) <= set(MODALITIES):
        raise ValueError(f'modalities must be ("visual",), ("audio",) or both, got {modalities!r}')
    return chosen

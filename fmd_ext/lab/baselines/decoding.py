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
from fmd_ext.compat import cache_argument, cache_of
from fmd_ext.config import MODALITIES
from fmd_ext.engine.forward import arguments_by_name
from fmd_ext.lab.interception import intercepting
from fmd_ext.patching.handle import handle_of

GROWING = ("input_ids", "position_ids", "cache_position")  # arguments of a decode step, one entry per new position


class Run:
    """A second run of the model beside the plain one, on its own cache.

    Attributes:
        name: what is different in it.
        hidden: layer -> bool [batch, heads, prompt length]: positions that nobody attends to in this run.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.cache = DynamicCache()
        self.waiting: list[dict[str, Any]] = []
        self.hidden: dict[int, Tensor] = {}

    def calls(self) -> list[dict[str, Any]]:
        """The calls to catch up with: the prompt, if it has not run yet, then all later steps as one."""
        waiting, self.waiting = self.waiting, []
        started = self.cache.get_seq_length() > 0
        prompt, steps = ([], waiting) if started else (waiting[:1], waiting[1:])
        if len(steps) > 1:
            joined = dict(steps[-1])  # its attention mask covers all
            for name in GROWING:
                if isinstance(joined.get(name), Tensor):
                    joined[name] = torch.cat([step[name] for step in steps], dim=-1)
            steps = [joined]
        return prompt + steps


class Sequence:
    """A batch that is being decoded: what was measured on its prompt, and its second runs.

    Attributes:
        labels: int8 [batch, prompt length] of -1 padding, 0 text, 1 visual, 2 audio; None without any clip.
        runs: second runs by name.
        length: positions that have been run, padding included.
        measured: what the method keeps of the prompt.
    """

    def __init__(self, labels: Tensor | None) -> None:
        self.labels = labels
        self.runs: dict[str, Run] = {}
        self.length = 0
        self.measured: Any = None

    def add_runs(self, *names: str) -> None:
        self.runs.update({name: Run(name) for name in names})


class Method:
    """A baseline; subclasses override what they change."""

    def begin(self, sequence: Sequence, call: dict[str, Any]) -> None:
        """A prompt: ``sequence.add_runs`` if it needs any. ``call`` holds the arguments of forward by name."""

    def arguments(self, name: str, call: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the second run ``name`` for the same call."""
        return call

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
        self.sequences: weakref.WeakKeyDictionary[Any, Sequence] = weakref.WeakKeyDictionary()

    @torch.no_grad()
    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = arguments_by_name(self.signature, args, kwargs)
        cache = call.pop(self.cache_name, None)
        use_cache = call.pop("use_cache", None)
        sequence = self._sequence(call, cache)
        options = {name: call.pop(name) for name in list(call) if name.startswith(("output_", "return_"))}
        for name, run in sequence.runs.items():
            run.waiting.append(self.method.arguments(name, call))
        with self._attending(sequence, None):
            out = self.original(**call, **options, **{self.cache_name: cache}, use_cache=use_cache)
        new = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
        sequence.length += new.shape[1]
        if (filled := cache_of(out)) is not None:
            self.sequences[filled] = sequence

        def second(name: str) -> Tensor:
            run = sequence.runs[name]
            with self._attending(sequence, run):
                for again in run.calls():
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

    def _attending(self, sequence: Sequence, run: Run | None) -> contextlib.AbstractContextManager:
        if sequence.labels is None or type(self.method).attention is Method.attention:
            return contextlib.nullcontext()
        attention = functools.partial(self.method.attention, sequence, run)
        return intercepting(self.decoder, self.adapter.attention, attention)


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
    before = {name: entry.__dict__.get(name) for name in replaced}
    try:
        for name, function in replaced.items():
            entry.__dict__[name] = _method_like(entry, getattr(entry, name), function)
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


def visible_keys(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """bool [batch or 1, 1, queries, keys]: which key each query sees, from the mask that attention functions get.

    Raises TypeError for a kind of mask that only one attention implementation understands.
    """
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        ones = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device)
        return ones.tril(diagonal=keys - queries)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise TypeError("baselines that change attention need attn_implementation 'sdpa' or 'eager'")
    mask = mask[..., :keys]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def attention_scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """float32 [batch, num_qo_heads, queries, keys] of query [batch, num_qo_heads, queries, head_dim] and key
    [batch, num_kv_heads, keys, head_dim]."""
    key = key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return query.float() @ key.transpose(-1, -2) * scale


def weighted_values(weights: Tensor, value: Tensor, like: Tensor) -> Tensor:
    """Attention output [batch, queries, num_qo_heads, head_dim] of weights [batch, num_qo_heads, queries, keys]."""
    value = value.float().repeat_interleave(weights.shape[1] // value.shape[1], dim=1)
    return (weights @ value).transpose(1, 2).to(like.dtype)


def attention_without(
    hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention [batch, queries, num_qo_heads, head_dim] in which ``hidden`` prompt positions [batch, heads or 1,
    prompt length] are no keys; a position always sees itself, so that no row is empty."""
    queries, keys = query.shape[2], key.shape[2]
    seen = visible_keys(mask, query, key).expand(len(hidden), hidden.shape[1], -1, -1).clone()
    seen[..., : hidden.shape[-1]] &= ~hidden[:, :, None]
    own = torch.ones(queries, keys, dtype=torch.bool, device=seen.device).tril(keys - queries).triu(keys - queries)
    out = nn.functional.scaled_dot_product_attention(query, key, value, seen | own, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)

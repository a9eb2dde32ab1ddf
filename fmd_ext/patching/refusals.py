"""Decoders that `patch` refuses by name, for what their layers do."""

from __future__ import annotations

import functools
import inspect

from torch import nn

from fmd_ext.adapters import Adapter
from fmd_ext.engine.forward import is_window

# Settings of a decoder's config that change what its layers see beyond rows and their keys.
UNSUPPORTED = {
    "attn_logit_softcapping": "caps its attention logits",
    "hidden_size_per_layer_input": "feeds every layer an input of its own",
    "num_kv_shared_layers": "lets later layers reuse the keys of earlier ones",
    "use_bidirectional_attention": "lets positions attend to later ones",
}


def attention_modules(layer: nn.Module, adapter: Adapter) -> list[nn.Module]:
    """The attention modules of a layer: the one that the adapter names, or those within what wraps it (PEFT's
    ``modules_to_save`` keeps the original and a copy per adapter). Empty where it is not one of transformers'."""
    named = getattr(layer, adapter.attention, None)
    if not isinstance(named, nn.Module):
        return []
    # A wrapper shows the attributes of what it wraps, but does not hold them.
    return [module for module in named.modules() if {"config", "layer_idx"} <= module.__dict__.keys()]


def refuse_unsupported(decoder: nn.Module, adapter: Adapter) -> None:
    """Raises TypeError for decoders whose attention is more than causal softmax attention over the whole context."""
    kind = type(decoder).__name__
    layer_types = getattr(decoder.config, "layer_types", None) or []
    other = sorted(set(layer_types) - {"full_attention"})
    if other:
        raise TypeError(f"{kind} has layers of type {', '.join(other)}; only full attention is supported")
    for name, what in UNSUPPORTED.items():
        if getattr(decoder.config, name, None) and _is_read(name, decoder):
            raise TypeError(f"{kind} {what} ({name}), which is not supported")
    takes_features = "deepstack_visual_embeds" in inspect.signature(decoder.forward).parameters
    if takes_features and not hasattr(decoder, adapter.deepstack):
        raise TypeError(
            f"{kind} adds visual features to early hidden states, but not in a method {adapter.deepstack!r}: name the "
            "method in the adapter's deepstack"
        )
    for index, layer in enumerate(decoder.layers):
        modules = attention_modules(layer, adapter)
        if not modules:
            raise TypeError(
                f"layer {index} of {kind} has no attention module {adapter.attention!r} with config and layer_idx, as "
                "transformers' decoders have"
            )
        for module in modules:
            window = None if layer_types else _window(decoder, module)
            if is_window(window, decoder.config):
                raise TypeError(f"{kind} attends to a sliding window of {window}; only full attention is supported")


def _window(decoder: nn.Module, attention: nn.Module) -> int | None:
    """The sliding window of a layer; None where the decoder has the setting but its code does not use it."""
    if "sliding_window" in attention.__dict__:
        return attention.__dict__["sliding_window"]
    for part, name in ((attention, "sliding_window"), (decoder, "create_sliding_window_causal_mask")):
        code = getattr(inspect.unwrap(type(part).forward), "__code__", None)
        if code is None or name in (*code.co_names, *code.co_consts):
            return getattr(decoder.config, "sliding_window", None)
    return None


def _is_read(name: str, decoder: nn.Module) -> bool:
    """Whether the source file of the decoder's layers mentions a setting; a config may hold one that nothing reads."""
    kinds: set[type] = {type(decoder), type(decoder.layers[0])}
    sources = [_source(kind) for kind in kinds]
    return not all(sources) or any(name in source for source in sources)


@functools.cache
def _source(kind: type) -> str:
    """The source of the file that a class is in; "" where there is none."""
    module = inspect.getmodule(kind)
    try:
        return "" if module is None else inspect.getsource(module)
    except (OSError, TypeError):
        return ""

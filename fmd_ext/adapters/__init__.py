"""The table of supported model families. Adding one: a short file beside this one and an entry here.

A family can also come from outside: `register` adds it, and so does an entry point of the group ``fmd_ext.adapters`` in
an installed package, which names an `Adapter`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging

from torch import nn

from fmd_ext.labels import AUDIO, JOINT, LABELS, PADDING, TEXT, VISUAL

from .base import Adapter, TokenSource
from .phi4_multimodal import PHI4_MULTIMODAL
from .qwen2_5_omni import QWEN2_5_OMNI
from .qwen3_omni import QWEN3_OMNI
from .text_decoder import TEXT_DECODER
from .video_salmonn import VIDEO_SALMONN
from .video_salmonn2 import VIDEO_SALMONN2
from .video_salmonn2_plus import VIDEO_SALMONN2_PLUS
from .videollama2 import VIDEOLLAMA2

__all__ = [
    "ADAPTERS",
    "AUDIO",
    "JOINT",
    "LABELS",
    "PADDING",
    "TEXT",
    "VISUAL",
    "Adapter",
    "TokenSource",
    "find_adapter",
    "register",
]

ENTRY_POINTS = "fmd_ext.adapters"

logger = logging.getLogger(__name__)

ADAPTERS: dict[str, Adapter] = {
    "phi4_multimodal": PHI4_MULTIMODAL,
    "qwen2_5_omni": QWEN2_5_OMNI,
    "qwen3_omni": QWEN3_OMNI,
    "video_salmonn": VIDEO_SALMONN,
    "video_salmonn2": VIDEO_SALMONN2,
    "video_salmonn2_plus": VIDEO_SALMONN2_PLUS,
    "videollama2": VIDEOLLAMA2,
    "text": TEXT_DECODER,
}


def register(name: str, adapter: Adapter) -> None:
    """Adds a model family. From then on `patch` finds it by ``model.config.model_type`` and by ``name``.

    Registering the same adapter again changes nothing.

    Raises:
        TypeError: no `Adapter`.
        ValueError: ``name``, or one of its model types, is another adapter's.
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter {name!r} must be a fmd_ext.adapters.Adapter, got {adapter!r}")
    known = ADAPTERS.get(name)
    if known is not None and known != adapter:
        raise ValueError(f"there is another adapter {name!r} already, {known.name}")
    for model_type in adapter.model_types:
        other = next((n for n, a in ADAPTERS.items() if n != name and model_type in a.model_types), None)
        if other is not None:
            raise ValueError(f"model type {model_type!r} of adapter {name!r} is served by {other!r} already")
    ADAPTERS[name] = adapter


def find_adapter(model: nn.Module, adapter: str | Adapter | None = None) -> Adapter:
    """The adapter for ``model``: the one asked for (by name or object), else by ``model.config.model_type``.

    Adapters of installed packages are looked at where none of this package's serves.

    Raises:
        TypeError: no adapter serves the model; the message lists what is supported and how to pass labels by hand.
        ValueError: an unknown adapter name.
    """
    if isinstance(adapter, Adapter):
        return adapter
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    found = _look_up(model_type, adapter)
    if found is None:
        problems = _register_installed()
        found = _look_up(model_type, adapter)
    if found is not None:
        return found
    failed = f" Not loaded: {'; '.join(problems)}." if problems else ""
    if adapter is not None:
        raise ValueError(f"unknown adapter {adapter!r}; the adapters are {', '.join(map(repr, ADAPTERS))}.{failed}")
    supported = sorted(t for candidate in ADAPTERS.values() for t in candidate.model_types)
    raise TypeError(
        f"no adapter for {type(model).__name__} (model_type {model_type!r}). Supported model types: "
        f"{', '.join(supported)}. For any other Llama- or Qwen-like decoder use patch(model, adapter='text') and pass "
        f"modality_labels (0 text, 1 visual, 2 audio) with the embeddings.{failed}"
    )


def _look_up(model_type: str | None, name: str | None) -> Adapter | None:
    if name is not None:
        return ADAPTERS.get(name)
    return next((candidate for candidate in ADAPTERS.values() if model_type in candidate.model_types), None)


@functools.cache
def _register_installed() -> tuple[str, ...]:
    """Registers what installed packages bring, once. Returns what could not be registered, and why."""
    problems = []
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            register(point.name, point.load())
        except Exception as error:  # another package's fault must not stop ours
            problems.append(f"{point.name} ({point.value}): {type(error).__name__}: {error}")
            logger.warning("fmd_ext: an installed adapter cannot be used, %s", problems[-1])
    return tuple(problems)

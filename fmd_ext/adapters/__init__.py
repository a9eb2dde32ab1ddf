"""The table of supported model families. Adding one: a short file beside this one and an entry here."""

from __future__ import annotations

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
]

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


def find_adapter(model: nn.Module, adapter: str | Adapter | None = None) -> Adapter:
    """The adapter for ``model``: the one asked for (by name or object), else by ``model.config.model_type``.

    Raises:
        TypeError: no adapter serves the model; the message lists what is supported and how to pass labels by hand.
        ValueError: an unknown adapter name.
    """
    if isinstance(adapter, Adapter):
        return adapter
    if adapter is not None:
        if adapter not in ADAPTERS:
            raise ValueError(f"unknown adapter {adapter!r}; the adapters are {', '.join(map(repr, ADAPTERS))}")
        return ADAPTERS[adapter]
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for candidate in ADAPTERS.values():
        if model_type in candidate.model_types:
            return candidate
    supported = sorted(t for candidate in ADAPTERS.values() for t in candidate.model_types)
    raise TypeError(
        f"no adapter for {type(model).__name__} (model_type {model_type!r}). Supported model types: "
        f"{', '.join(supported)}. For any other Llama- or Qwen-like decoder use patch(model, adapter='text') and pass "
        "modality_labels (0 text, 1 visual, 2 audio) with the embeddings."
    )

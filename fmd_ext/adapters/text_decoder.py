"""Any Llama- or Qwen-like text decoder, for callers who hand over embeddings and modality labels themselves."""

from __future__ import annotations

from .base import Adapter

TEXT_DECODER = Adapter(
    name="text decoder, labels by hand",
    model_types=(),  # never chosen by itself: the caller asks for it
    entry=("",),
    decoder=("model.language_model", "language_model", "model", ""),
)

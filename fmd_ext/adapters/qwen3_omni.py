"""Qwen3-Omni: the thinker alone, or the full model (whose talker reads the thinker's hidden states)."""

from __future__ import annotations

from .base import Adapter
from .qwen2_5_omni import QWEN2_5_OMNI

QWEN3_OMNI = Adapter(
    name="Qwen3-Omni",
    model_types=("qwen3_omni_moe", "qwen3_omni_moe_thinker"),
    entry=QWEN2_5_OMNI.entry,
    decoder=QWEN2_5_OMNI.decoder,
    sources=QWEN2_5_OMNI.sources,
    rotary=QWEN2_5_OMNI.rotary,
)

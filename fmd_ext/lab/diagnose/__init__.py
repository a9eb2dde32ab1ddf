"""What a model does with what it sees and hears."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmd_ext.lab.diagnose.attention import AttentionShare, LayerShare, attention_share

__all__ = ["AttentionShare", "LayerShare", "attention_share"]


def __getattr__(name: str) -> Any:
    """When first used: who plots needs no model."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("fmd_ext.lab.diagnose.attention"), name)

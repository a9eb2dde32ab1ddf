"""The operators, and the loader of their libraries.

The functions of `fmd_ext.ops.operators` are attributes of this package. They are imported when first used: `fmd-ext
doctor` imports `fmd_ext.ops.library` to say why a library does not load.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["append_", "branched_decode", "branched_prefill", "merge_", "rope_append_"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module("fmd_ext.ops.operators"), name)
    globals()[name] = value
    return value

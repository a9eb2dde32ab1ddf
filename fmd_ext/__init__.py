"""Fork-merge decoding (arXiv 2505.20873) for audio-visual language models: `patch(model)` switches it on."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .torchvision_mend import mend_when_torchvision_is_imported

if TYPE_CHECKING:
    from .config import FMDConfig
    from .patching import Handle, ModalityQuestion, Router, Routes, handle_of, patch, unpatch

mend_when_torchvision_is_imported()  # transformers' models do

__all__ = ["FMDConfig", "Handle", "ModalityQuestion", "Router", "Routes", "handle_of", "patch", "unpatch"]
__version__ = "0.1.0"

# Imported when first used: `fmd-ext doctor` must be able to say why the op library does not load.
_HOMES = {name: "config" if name == "FMDConfig" else "patching" for name in __all__}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "FMDConfig":
        from .compat import warn_about_transformers

        warn_about_transformers()
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Fork-merge decoding (arXiv 2505.20873) for audio-visual language models: `patch(model)` switches it on."""

from __future__ import annotations

from . import compat

compat.mend_torchvision()  # before anything imports transformers' models

from .config import FMDConfig  # noqa: E402
from .patch import Handle, handle_of, patch, unpatch  # noqa: E402

__all__ = ["FMDConfig", "Handle", "handle_of", "patch", "unpatch"]
__version__ = "0.1.0"

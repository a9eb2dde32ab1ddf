"""What is put on a model and taken off again: `patch`, `unpatch`, and the handle between them."""

from __future__ import annotations

from fmd_ext.patching.handle import Handle, handle_of, patch, unpatch

__all__ = ["Handle", "handle_of", "patch", "unpatch"]

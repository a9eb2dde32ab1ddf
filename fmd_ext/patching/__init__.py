"""What is put on a model and taken off again: `patch`, `unpatch`, and the handle between them."""

from __future__ import annotations

from fmd_ext.engine.routes import Routes
from fmd_ext.patching.handle import Handle, handle_of, patch, unpatch
from fmd_ext.patching.modality_question import ModalityQuestion
from fmd_ext.patching.routing import Router

__all__ = ["Handle", "ModalityQuestion", "Router", "Routes", "handle_of", "patch", "unpatch"]

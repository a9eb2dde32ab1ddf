"""The command line: ``fmd-ext ask``, ``demo``, ``doctor``, ``verify`` and the rest of its help."""

from __future__ import annotations

from fmd_ext.cli.main import main

__all__ = ["main"]

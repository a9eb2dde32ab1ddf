"""The command line: ``fmd-ext ask``, ``fmd-ext demo`` and ``fmd-ext doctor``."""

from __future__ import annotations

from fmd_ext.cli.main import main

__all__ = ["main"]

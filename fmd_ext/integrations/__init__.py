"""fmd_ext within other people's tools."""

from __future__ import annotations

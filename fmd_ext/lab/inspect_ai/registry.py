"""What inspect_ai's entry point group ``inspect_ai`` loads."""

from __future__ import annotations

from fmd_ext.lab.inspect_ai.model import FMDModel
from fmd_ext.lab.inspect_ai.tasks import as_a_person_reads, benchmark

__all__ = ["FMDModel", "as_a_person_reads", "benchmark"]

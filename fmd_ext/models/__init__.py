"""Ports of models that transformers lacks, as ordinary transformers models that load the published checkpoints.

Importing this package makes them known to transformers' Auto classes.
"""

from . import video_salmonn, videollama2

__all__ = ["video_salmonn", "videollama2"]

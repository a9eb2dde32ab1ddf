"""Ports of models that transformers lacks, as ordinary transformers models that load the published checkpoints.

Importing this package makes them known to transformers' Auto classes.
"""

from . import classes, video_salmonn, video_salmonn2, video_salmonn2_plus, videollama2

__all__ = ["classes", "video_salmonn", "video_salmonn2", "video_salmonn2_plus", "videollama2"]

"""What the project makes itself to run without a download: clips, random-weight models and their processor."""

from __future__ import annotations

from fmd_ext.inputs.sample_clip import write_clip
from fmd_ext.lab.tiny.folder import save_random_model
from fmd_ext.lab.tiny.model import tiny_omni, tiny_omni_config, tiny_thinker, tiny_thinker_config
from fmd_ext.lab.tiny.processor import tiny_processor
from fmd_ext.lab.tiny.vocabulary import SPECIAL_TOKENS, TOKEN_IDS, VOCAB_SIZE

__all__ = [
    "SPECIAL_TOKENS",
    "TOKEN_IDS",
    "VOCAB_SIZE",
    "save_random_model",
    "tiny_omni",
    "tiny_omni_config",
    "tiny_processor",
    "tiny_thinker",
    "tiny_thinker_config",
    "write_clip",
]

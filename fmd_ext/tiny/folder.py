"""Writes a random-weight model to disk in the layout of a downloaded one."""

from __future__ import annotations

from pathlib import Path

import torch

from fmd_ext.tiny.model import tiny_omni, tiny_thinker
from fmd_ext.tiny.processor import tiny_processor, tiny_qwen3_processor, unreadable_tokens
from fmd_ext.tiny.qwen3_omni import tiny_qwen3_omni, tiny_qwen3_thinker

RANDOM_MARK = "random_weights"

# family -> thinker alone, full model, processor
MAKERS = {
    "qwen2_5_omni": (tiny_thinker, tiny_omni, tiny_processor),
    "qwen3_omni": (tiny_qwen3_thinker, tiny_qwen3_omni, tiny_qwen3_processor),
}


def save_random_model(
    folder: str | Path, seed: int = 0, *, speech: bool = False, family: str = "qwen2_5_omni", **dims: int
) -> Path:
    """Writes a complete model folder (weights, configuration, processor) and returns its path.

    ``from_pretrained`` and ``fmd-ext ask --model FOLDER`` load it like any other. The configuration carries
    ``random_weights: true``, so that nobody takes the answers for a model's.

    Args:
        folder: created if missing; files of an earlier model in it are replaced.
        seed: of the weights.
        speech: the full model with talker and speech decoder instead of the thinker alone.
        family: ``"qwen2_5_omni"`` or ``"qwen3_omni"``.
        dims: see ``tiny_thinker_config`` and ``tiny_qwen3_thinker_config``.
    """
    folder = Path(folder)
    thinker_alone, full, processor = MAKERS[family]
    model = full(seed, **dims) if speech else thinker_alone(seed, **dims)
    setattr(model.config, RANDOM_MARK, True)
    thinker = model.thinker if speech else model
    # Random weights pick bytes that are no text and placeholders of pictures that are not there.
    thinker.generation_config.suppress_tokens = unreadable_tokens()
    model.generation_config = thinker.generation_config
    model.save_pretrained(folder)
    if speech and family == "qwen2_5_omni":
        torch.save(model.speaker_map, folder / "spk_dict.pt")
    processor().save_pretrained(folder)
    return folder

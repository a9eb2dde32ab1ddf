"""Writes a random-weight model to disk in the layout of a downloaded one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fmd_ext.cli.models import RANDOM_MARK
from fmd_ext.lab.tiny.model import tiny_omni, tiny_thinker
from fmd_ext.lab.tiny.processor import tiny_processor, tiny_qwen3_processor, unreadable_tokens
from fmd_ext.lab.tiny.qwen3_omni import tiny_qwen3_omni, tiny_qwen3_thinker
from fmd_ext.lab.tiny.vocabulary import VOCAB_SIZE


def _makers(family: str) -> tuple[Any, Any, Any]:
    """The model that answers in text, the full model with speech (None: has none), the processor of a configuration."""
    if family == "qwen2_5_omni":
        return tiny_thinker, tiny_omni, lambda config: tiny_processor()
    if family == "qwen3_omni":
        return tiny_qwen3_thinker, tiny_qwen3_omni, lambda config: tiny_qwen3_processor()
    if family == "videollama2":
        from fmd_ext.lab.tiny.videollama2 import (  # only here: our ports take time to import
            processor_for,
            tiny_videollama2,
        )

        return tiny_videollama2, None, processor_for
    if family == "video_salmonn2_plus":
        from fmd_ext.lab.tiny.video_salmonn2_plus import processor_for, tiny_video_salmonn2_plus

        return tiny_video_salmonn2_plus, None, processor_for
    raise ValueError(f"family {family!r}: accepted are qwen2_5_omni, qwen3_omni, videollama2, video_salmonn2_plus")


def save_random_model(
    folder: str | Path, seed: int = 0, *, speech: bool = False, family: str = "qwen2_5_omni", **dims: Any
) -> Path:
    """Writes a complete model folder (weights, configuration, processor) and returns its path.

    ``from_pretrained`` and ``fmd-ext ask --model FOLDER`` load it like any other. The configuration carries
    ``random_weights: true``, so that nobody takes the answers for a model's.

    Args:
        folder: created if missing; files of an earlier model in it are replaced.
        seed: of the weights.
        speech: the full model with talker and speech decoder instead of the thinker alone.
        family: ``"qwen2_5_omni"``, ``"qwen3_omni"``, ``"videollama2"`` or ``"video_salmonn2_plus"``.
        dims: see ``tiny_thinker_config``, ``tiny_qwen3_thinker_config``, ``tiny_videollama2_config`` and
            ``tiny_video_salmonn2_plus_config``.
    """
    folder = Path(folder)
    thinker_alone, full, processor = _makers(family)
    if speech and full is None:
        raise ValueError(f"{family} does not speak")
    model = full(seed, **dims) if speech else thinker_alone(seed, **dims)
    setattr(model.config, RANDOM_MARK, True)
    thinker = model.thinker if speech else model
    # Random weights pick bytes that are no text and placeholders of pictures that are not there.
    beyond = range(VOCAB_SIZE, thinker.config.get_text_config().vocab_size)
    thinker.generation_config.suppress_tokens = [*unreadable_tokens(), *beyond]
    model.generation_config = thinker.generation_config
    model.save_pretrained(folder)
    if speech and family == "qwen2_5_omni":
        torch.save(model.speaker_map, folder / "spk_dict.pt")
    processor(model.config).save_pretrained(folder)
    return folder

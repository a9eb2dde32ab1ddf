"""The small model that is trained, before training, and its processor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration

from fmd_ext.inputs.chat import SYSTEM_PROMPT
from fmd_ext.lab.synthetic import questions_about, scene_of
from fmd_ext.lab.synthetic.questions import caption_question
from fmd_ext.lab.synthetic.scenes import HEIGHT, WIDTH
from fmd_ext.lab.tiny import tiny_processor, tiny_thinker
from fmd_ext.patching.modality_question import MODALITY_QUESTIONS

# Six layers, so that there are depths to fork at. Clips of two seconds are one window of the sound's encoder.
DIMS = {
    "num_layers": 6,
    "hidden_size": 128,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 256,
    "max_position_embeddings": 4096,
    "encoder_size": 64,
    "audio_window": 128,
}
AUDIO_SECONDS = 8  # what the processor pads sound to


def new_processor() -> Qwen2_5OmniProcessor:
    """One token per word of the questions and answers, few pixels per frame."""
    return tiny_processor(sorted(set(_texts())), frame_pixels=WIDTH * HEIGHT, audio_seconds=AUDIO_SECONDS)


def new_model(processor: Qwen2_5OmniProcessor, seed: int) -> Qwen2_5OmniThinkerForConditionalGeneration:
    return tiny_thinker(seed, vocab_size=len(processor.tokenizer), **DIMS)


def save_model(
    model: Qwen2_5OmniThinkerForConditionalGeneration, processor: Qwen2_5OmniProcessor, folder: Path
) -> Path:
    """Writes weights, configuration and processor in the layout of a downloaded model.

    The weights are stored in bfloat16, which halves the file, and marked to be loaded as float32.
    """
    model.save_pretrained(folder)
    weights = {name: value.to(torch.bfloat16) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    processor.save_pretrained(folder)
    return folder


def _texts() -> Iterator[str]:
    yield from (SYSTEM_PROMPT, "system", "user", "assistant")
    for scene in map(scene_of, range(1000)):
        captions = (caption_question(scene, senses) for senses in ("video", "audio"))
        for question in (*questions_about(scene), *captions):
            for instructed in (False, True):
                yield from question.asked(instructed)
            yield from (f" {choice}" for choice in question.choices)
            yield from (MODALITY_QUESTIONS["en"].about(question.text), question.needs)

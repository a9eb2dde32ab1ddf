"""How well an unpatched model answers the yes/no questions of whole clips, by task and by relation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fmd_ext.lab.synthetic import Scene, questions_about
from fmd_ext.lab.training.loop import encode_pictures, encode_sounds, openings
from fmd_ext.lab.training.packing import embed_opening, pack, packed_hidden
from fmd_ext.lab.training.pool import Pool

BATCH = 25


@torch.no_grad()
def yes_no_accuracy(model: nn.Module, processor: Any, pool: Pool, scenes: list[Scene]) -> dict[str, dict[str, float]]:
    """Accuracy per task and relation; ``scenes[i]`` is what item i of the pool shows and lets hear."""
    training = model.training
    model.eval()
    opening = openings(model, processor, pool)["both"]
    words = [processor.tokenizer(word)["input_ids"][0] for word in ("yes", "no")]
    right: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for start in range(0, len(scenes), BATCH):
        batch = scenes[start : start + BATCH]
        asked = [[q for q in questions_about(scene) if q.answer in ("yes", "no")] for scene in batch]
        prompts = [[processor.tokenizer(question.asked()[0])["input_ids"] for question in clip] for clip in asked]
        packed = pack(opening, [[(prompt, []) for prompt in clip] for clip in prompts])
        video = encode_pictures(model, processor, pool.frames[start : start + len(batch)])
        audio = encode_sounds(model, pool.mels[start : start + len(batch)].astype(np.float32))
        hidden = packed_hidden(model, opening, embed_opening(model, opening, video, audio), packed)
        logits = model.get_output_embeddings()(hidden)[..., words]
        for row, (scene, clip) in enumerate(zip(batch, asked, strict=True)):
            for place, question in zip(packed.places[row], clip, strict=True):
                says = "yes" if logits[row, place, 0] > logits[row, place, 1] else "no"
                right[question.task, scene.relation].append(says == question.answer)
    model.train(training)
    table: dict[str, dict[str, float]] = defaultdict(dict)
    for (task, relation), values in sorted(right.items()):
        table[task][relation] = round(float(np.mean(values)), 4)
    return dict(table)


@torch.no_grad()
def exact_answers(
    model: nn.Module, processor: Any, pool: Pool, scenes: Sequence[Scene], instructed: bool = False
) -> list[tuple[str, str, bool]]:
    """Task, relation and whether greedy decoding gives the very answer, of every question about ``scenes``.

    An answer is right when each of its tokens, its end among them, is the likeliest after those before it. The model
    must not be patched; ``instructed`` as in `Question.asked`.
    """
    opening, end = openings(model, processor, pool)["both"], model.generation_config.eos_token_id
    found: list[tuple[str, str, bool]] = []
    for start in range(0, len(scenes), BATCH):
        batch = scenes[start : start + BATCH]
        asked = [[(question, *question.asked(instructed)) for question in questions_about(scene)] for scene in batch]
        tokens = processor.tokenizer
        texts = [[(tokens(p)["input_ids"], [*tokens(a)["input_ids"], end]) for _, p, a in clip] for clip in asked]
        packed = pack(opening, texts)
        video = encode_pictures(model, processor, pool.frames[start : start + len(batch)])
        audio = encode_sounds(model, pool.mels[start : start + len(batch)].astype(np.float32))
        hidden = packed_hidden(model, opening, embed_opening(model, opening, video, audio), packed)
        hits = model.get_output_embeddings()(hidden).argmax(-1) == packed.targets
        for row, (scene, clip) in enumerate(zip(batch, asked, strict=True)):
            for place, (question, _, _), (_, answer) in zip(packed.places[row], clip, texts[row], strict=True):
                right = bool(hits[row, place : place + len(answer)].all())
                found.append((f"{question.family}: {question.task}", scene.relation, right))
    return found

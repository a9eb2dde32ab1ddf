"""Answers to yes/no questions about many clips: each clip is read once, its questions go on from its cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import fmd_ext
from fmd_ext.adapters import find_adapter
from fmd_ext.compat import cache_kwargs, cache_of
from fmd_ext.lab.synthetic import Question, Scene, questions_about
from fmd_ext.lab.training.loop import encode_pictures, encode_sounds, openings
from fmd_ext.lab.training.packing import embed_opening
from fmd_ext.lab.training.pool import Pool

BATCH = 60


@dataclasses.dataclass(frozen=True)
class Item:
    """A yes/no question about clip number ``clip``; ``answer`` is True for yes."""

    clip: int
    relation: str
    task: str
    answer: bool


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Clips whose prompts have the same opening.

    Args:
        embeds: float32 [clips, opening, hidden].
        ids: int64 [slots, clips, length]: the n-th question of each clip, with what closes it; padded behind.
        last: int64 [slots, clips]: where the answer is predicted.
        items: [slots][clips] numbers of items; -1 where a clip has fewer questions.
    """

    embeds: torch.Tensor
    ids: torch.Tensor
    last: torch.Tensor
    items: np.ndarray


class YesNoQuestions:
    """The yes/no questions of AVHBench about clips, ready to be asked.

    Attributes:
        items: all questions; ``scores`` of `ask` are in their order.
    """

    def __init__(self, model: nn.Module, processor: Any, pool: Pool, scenes: Sequence[Scene]) -> None:
        self.items: list[Item] = []
        self.opening = openings(model, processor, pool)["both"]
        self.words = [processor.tokenizer(word)["input_ids"][0] for word in ("yes", "no")]
        self._batches: list[_Batch] = []
        asked = [[q for q in questions_about(scene) if q.family == "avhbench" and q.choices == ()] for scene in scenes]
        asked = [[q for q in questions if q.answer in ("yes", "no")] for questions in asked]
        # Clips with equally many questions go together, so that few slots stay empty.
        order = sorted(range(len(scenes)), key=lambda clip: len(asked[clip]))
        for start in range(0, len(order), BATCH):
            clips = order[start : start + BATCH]
            self._batches.append(self._batch(model, processor, pool, scenes, asked, clips))

    @torch.no_grad()
    def _batch(
        self,
        model: nn.Module,
        processor: Any,
        pool: Pool,
        scenes: Sequence[Scene],
        asked: list[list[Question]],
        clips: list[int],
    ) -> _Batch:
        video = encode_pictures(model, processor, pool.frames[clips])
        audio = encode_sounds(model, pool.mels[clips].astype(np.float32))
        slots = max(len(asked[clip]) for clip in clips)
        items = np.full((slots, len(clips)), -1)
        prompts: list[list[list[int]]] = [[[] for _ in clips] for _ in range(slots)]
        for column, clip in enumerate(clips):
            for slot, question in enumerate(asked[clip]):
                items[slot, column] = len(self.items)
                self.items.append(Item(clip, scenes[clip].relation, question.task, question.answer == "yes"))
                prompts[slot][column] = processor.tokenizer(question.asked()[0])["input_ids"] + self.opening.closing
        length = max(len(prompt) for row in prompts for prompt in row)
        ids = torch.zeros(slots, len(clips), length, dtype=torch.long)
        last = torch.zeros(slots, len(clips), dtype=torch.long)
        for slot, row in enumerate(prompts):
            for column, prompt in enumerate(row):
                ids[slot, column, : len(prompt)] = torch.tensor(prompt, dtype=torch.long)
                last[slot, column] = max(0, len(prompt) - 1)
        return _Batch(embed_opening(model, self.opening, video, audio), ids, last, items)

    @torch.no_grad()
    def ask(self, model: nn.Module) -> np.ndarray:
        """float32 [items]: by how much the logit of "yes" exceeds that of "no". The model may be patched."""
        margins = np.zeros(len(self.items), np.float32)
        for batch in self._batches:
            self._ask(model, batch, margins)
        return margins

    def prompts(self, model: nn.Module, task: str, count: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """``count`` single questions of a task, evenly spread.

        Each is the item's number, the index of the question's last token, and the inputs as `attention_share` takes
        them.
        """
        of_task = [number for number, item in enumerate(self.items) if item.task == task]
        wanted = {of_task[index * len(of_task) // count] for index in range(count)}
        table = find_adapter(model).find_decoder(model).get_input_embeddings()
        for batch in self._batches:
            for slot, column in np.argwhere(np.isin(batch.items, list(wanted))):
                length = int(batch.last[slot, column]) + 1
                embeds = torch.cat([batch.embeds[column], table(batch.ids[slot, column, :length])])
                after = int(self.opening.positions.max()) + 1 + torch.arange(length)
                labels = torch.cat([self.opening.labels, torch.zeros(length, dtype=torch.long)])
                inputs = {
                    "inputs_embeds": embeds[None].detach(),
                    "position_ids": torch.cat([self.opening.positions, after.expand(3, length)], 1)[:, None],
                    "modality_labels": labels[None],
                }
                yield int(batch.items[slot, column]), len(embeds) - len(self.opening.closing) - 1, inputs

    def _ask(self, model: nn.Module, batch: _Batch, margins: np.ndarray) -> None:
        clips, before = batch.embeds.shape[:2]
        entry = find_adapter(model).find_entry(model)
        labels = {"modality_labels": self.opening.labels.expand(clips, -1)} if fmd_ext.handle_of(model) else {}
        positions = self.opening.positions[:, None].expand(3, clips, -1)
        cache = cache_of(entry(inputs_embeds=batch.embeds, position_ids=positions, use_cache=True, **labels))
        length = batch.ids.shape[2]
        # As a conversation with this question alone would count.
        after = (int(self.opening.positions.max()) + 1 + torch.arange(length)).expand(3, clips, length)
        for ids, last, items in zip(batch.ids, batch.last, batch.items, strict=True):
            # What is behind the answer's place is padding, which nothing before it can see.
            logits = entry(input_ids=ids, position_ids=after, **cache_kwargs(cache), use_cache=True).logits  # text
            cache.crop(-length)
            chosen = logits[torch.arange(clips), last][:, self.words]
            there = items >= 0
            margins[items[there]] = (chosen[:, 0] - chosen[:, 1]).float().numpy()[there]
        assert cache.get_seq_length() == before


def scores(items: Sequence[Item], margins: np.ndarray) -> np.ndarray:
    """1 where the likelier of yes and no is right, else 0: float64 [items]."""
    return ((margins > 0) == np.array([item.answer for item in items])).astype(float)

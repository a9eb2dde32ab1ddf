"""Questions about many clips as whole prompts, each by itself: token ids and features, as a user's call has them.

Every method that decodes through the model's own forward can be asked, and what it costs is counted.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fmd_ext.adapters import find_adapter
from fmd_ext.lab.evidence.answers import Item
from fmd_ext.lab.synthetic import Question, Scene, questions_about
from fmd_ext.lab.training.loop import openings
from fmd_ext.lab.training.pool import Pool

BATCH = 48
SENSES = ("both", "video", "audio")  # what a prompt has of its clip


@dataclasses.dataclass(frozen=True)
class Cost:
    """What it took to ask.

    Args:
        passes: forward calls of the decoder.
        layer_rows: rows that decoder layers have computed, summed over layers.
        seconds: of the calls, encoders included.
        questions: that were asked.
    """

    passes: int
    layer_rows: int
    seconds: float
    questions: int


class WholePrompts:
    """The questions of some families about clips, each with one right first token.

    Attributes:
        items: all questions.
        texts: their texts.
        needs: what each of them needs: "video", "audio" or "both".
    """

    def __init__(
        self, model: nn.Module, processor: Any, pool: Pool, scenes: Sequence[Scene], families: Sequence[str]
    ) -> None:
        self.processor, self.pool = processor, pool
        self.openings = {senses: openings(model, processor, pool)[senses] for senses in SENSES}
        self.words = [processor.tokenizer(word)["input_ids"][0] for word in ("yes", "no")]
        asked = [(clip, q) for clip, scene in enumerate(scenes) for q in questions_about(scene)]
        asked = [
            (clip, question) for clip, question in asked if question.family in families and _has_one_word(question)
        ]
        self.items = [_item(clip, scenes[clip], question) for clip, question in asked]
        self.texts = [question.asked()[0] for _, question in asked]
        self.needs = [question.needs for _, question in asked]
        self._prompts = [processor.tokenizer(text)["input_ids"] for text in self.texts]
        self._answers = np.array([processor.tokenizer(question.answer)["input_ids"][0] for _, question in asked])

    def batches(self, chosen: np.ndarray) -> list[np.ndarray]:
        """Numbers of the ``chosen`` [items] questions, those of one length together: no prompt is padded."""
        lengths = np.array([len(prompt) for prompt in self._prompts])
        groups = (np.flatnonzero(chosen & (lengths == length)) for length in np.unique(lengths))
        return [group[start : start + BATCH] for group in groups for start in range(0, len(group), BATCH)]

    def inputs(self, numbers: np.ndarray, senses: str = "both") -> dict[str, Any]:
        """Arguments of the model's forward call for one batch; ``senses`` as in SENSES."""
        opening = self.openings[senses]
        ids = [[*opening.ids.tolist(), *self._prompts[number], *opening.closing] for number in numbers]
        inputs: dict[str, Any] = {"input_ids": torch.tensor(ids)}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        clips = [self.items[number].clip for number in numbers]
        if senses != "audio":
            videos = list(torch.from_numpy(np.array(self.pool.frames[clips])).permute(0, 1, 4, 2, 3))
            options = {"do_sample_frames": False, "cap_pixels_per_frame": True, "return_tensors": "pt"}
            inputs.update(self.processor.video_processor(videos, **options))
            inputs["video_second_per_grid"] = torch.full((len(clips),), 1.0)
        if senses != "video":
            mels = torch.from_numpy(self.pool.mels[clips].astype(np.float32))
            inputs["input_features"] = mels
            inputs["feature_attention_mask"] = torch.ones(len(clips), mels.shape[2], dtype=torch.long)
        return inputs

    @torch.no_grad()
    def ask(
        self, model: nn.Module, senses: Sequence[str] | None = None, limit: int | None = None
    ) -> tuple[np.ndarray, Cost]:
        """What the model, patched or otherwise changed, answers.

        Args:
            senses: per item what its prompt has of the clip; None: both.
            limit: ask only this many batches, spread evenly, to measure time; None: all.

        Returns:
            float64 [items], 1 where the first token is right: of yes and no the likelier one, else the likeliest of
            all; and what it cost.
        """
        senses = np.array(senses if senses is not None else ["both"] * len(self.items))
        right, counter = np.zeros(len(self.items)), _Counter(find_adapter(model).find_decoder(model))
        seconds, asked = 0.0, 0
        with counter:
            for kind in dict.fromkeys(senses.tolist()):
                batches = self.batches(senses == kind)
                for numbers in batches if limit is None else batches[:: max(1, len(batches) // limit)][:limit]:
                    inputs = self.inputs(numbers, kind)
                    start = time.perf_counter()
                    logits = model(**inputs).logits[:, -1].float()
                    seconds += time.perf_counter() - start
                    right[numbers] = self._scores(logits, numbers)
                    asked += len(numbers)
        return right, Cost(counter.passes, counter.layer_rows, seconds, asked)

    def _scores(self, logits: torch.Tensor, numbers: np.ndarray) -> np.ndarray:
        answers = self._answers[numbers]
        pairs = logits[:, self.words]
        said = np.where(np.isin(answers, self.words), np.array(self.words)[pairs.argmax(1)], logits.argmax(1))
        return (said == answers).astype(float)


class _Counter:
    """Counts the calls of a decoder and the rows of its layers while it is entered."""

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder
        self.passes = self.layer_rows = 0

    def __enter__(self) -> None:
        self._hooks = [layer.register_forward_pre_hook(self._count, with_kwargs=True) for layer in self.decoder.layers]

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.passes += layer is self.decoder.layers[0]
        self.layer_rows += hidden.shape[0] * hidden.shape[1]


def _has_one_word(question: Question) -> bool:
    return question.answer != "" and len(question.answer.split()) == 1


def _item(clip: int, scene: Scene, question: Question) -> Item:
    return Item(clip, scene.relation, question.task, question.answer == "yes")

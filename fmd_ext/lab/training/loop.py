"""The training loop: deterministic given the seed, resumes where it was stopped, logs its curve as JSON lines."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fmd_ext.adapters import find_adapter
from fmd_ext.inputs.media import Clip
from fmd_ext.lab.training.packing import Opening, embed_opening, opening_of, pack, packed_hidden
from fmd_ext.lab.training.pool import Pool
from fmd_ext.lab.training.sampling import SORTS, Mixture, Sample, draw_samples

MIXTURES = {
    # First the encoders learn what things look and sound like, apart; then come the clips with both.
    "apart": Mixture({"both": 2, "video": 12, "audio": 12}, agreeing=0.9),
    "together": Mixture({"both": 8, "video": 20, "audio": 3}, agreeing=0.9),
    # Last it learns to compare; how to hear against the picture is not taught by that.
    "compared": Mixture({"both": 8, "video": 16, "audio": 3, "compared": 10}, agreeing=0.9),
}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Steps and learning rates.

    Args:
        apart, together: share of the steps after which that mixture ends.
        asked: samples per step, five questions each, without a clip: which modality does the answer need? They are
            drawn apart, so that a model trained without them (0) sees the same of all else.
    """

    steps: int
    apart: float = 0.3
    together: float = 0.54
    warmup: int = 150
    peak: float = 2e-3
    floor: float = 5e-5
    weight_decay: float = 0.05
    asked: int = 2

    def rate(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.floor + (self.peak - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def mixture(self, step: int) -> Mixture:
        done = step / self.steps
        return MIXTURES["apart" if done < self.apart else "together" if done < self.together else "compared"]


class Trainer:
    """A model, what it learns from, and how far it is."""

    def __init__(self, model: nn.Module, processor: Any, pool: Pool, schedule: Schedule, seed: int) -> None:
        self.model, self.processor, self.pool, self.schedule, self.seed = model, processor, pool, schedule, seed
        self.step = 0
        self.optimizer = torch.optim.AdamW(_groups(model, schedule.weight_decay), lr=0.0, betas=(0.9, 0.98))
        self.openings = openings(model, processor, pool)
        self._tokens: dict[str, list[int]] = {}

    def run_step(self) -> float:
        """One step of the optimizer; returns the loss."""
        rng = np.random.default_rng([self.seed, self.step])
        batch = draw_samples(self.pool, self.schedule.mixture(self.step), rng)
        asked = Mixture({"asked": self.schedule.asked}, agreeing=0.0)
        batch.update(draw_samples(self.pool, asked, np.random.default_rng([self.seed, self.step, 1])))
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        video, audio = self._features(batch, rng)
        losses, questions = [], 0
        for sort, samples in ((sort, samples) for sort, samples in batch.items() if samples):
            losses.append(self._loss(self.openings[SORTS[sort]], samples, video.get(sort), audio.get(sort)))
            questions += sum(len(sample.questions) for sample in samples)
        loss = sum(losses) / questions
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def _features(self, batch: dict[str, list[Sample]], rng: np.random.Generator) -> tuple[dict, dict]:
        """The encoders' output for all samples, [clips * tokens, hidden] per sort."""
        seen = [sort for sort in batch if SORTS[sort] in ("both", "video")]
        heard = [sort for sort in batch if SORTS[sort] in ("both", "audio")]
        frames = self.pool.frames[[sample.picture for sort in seen for sample in batch[sort]]]
        frames = np.clip(frames + rng.integers(-12, 13, (len(frames), 1, 1, 1, 3)), 0, 255).astype(np.uint8)
        mels = self.pool.mels[[sample.sound for sort in heard for sample in batch[sort]]].astype(np.float32)
        mels = np.stack([np.roll(mel, int(rng.integers(mel.shape[1])), axis=1) for mel in mels])
        mels += rng.normal(0, 0.05, mels.shape).astype(np.float32)
        video, audio = encode_pictures(self.model, self.processor, frames), encode_sounds(self.model, mels)
        return _cut(video, batch, seen), _cut(audio, batch, heard)

    def _loss(
        self, opening: Opening, samples: list[Sample], video: torch.Tensor | None, audio: torch.Tensor | None
    ) -> torch.Tensor:
        asked = [
            [(self.tokens(prompt), [*self.tokens(answer), self._end]) for prompt, answer in sample.questions]
            for sample in samples
        ]
        packed = pack(opening, asked)
        hidden = packed_hidden(self.model, opening, embed_opening(self.model, opening, video, audio), packed)
        answers = packed.targets >= 0
        logits = self.model.get_output_embeddings()(hidden[answers])
        losses = cross_entropy(logits, packed.targets[answers], reduction="none")
        return (losses * packed.weights[answers]).sum()

    def tokens(self, text: str) -> list[int]:
        if text not in self._tokens:
            self._tokens[text] = self.processor.tokenizer(text)["input_ids"]
        return self._tokens[text]

    @property
    def _end(self) -> int:
        return self.model.generation_config.eos_token_id

    # --- stopping and going on ------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Everything that is needed to go on; the samples of a step depend on the seed and the step alone."""
        state = {"step": self.step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def openings(model: nn.Module, processor: Any, pool: Pool) -> dict[str, Opening]:
    """The sorts of prompts, by what they have: "both", "video", "audio" or "none"."""
    rate = processor.feature_extractor.sampling_rate
    frames, audio = np.array(pool.frames[0]), np.zeros(pool.mels.shape[2] * rate // 100, np.float32)
    seconds = len(frames) / 2
    clips = {
        "both": Clip(frames, 2.0, audio, rate, seconds),
        "video": Clip(frames, 2.0, None, rate, seconds),
        "audio": Clip(None, 2.0, audio, rate, seconds),
        "none": None,
    }
    return {senses: opening_of(model, processor, clip) for senses, clip in clips.items()}


def encode_pictures(model: nn.Module, processor: Any, frames: np.ndarray) -> torch.Tensor:
    """[clips * tokens, hidden] of uint8 [clips, T, H, W, 3]."""
    videos = list(torch.from_numpy(frames).permute(0, 1, 4, 2, 3))
    inputs = processor.video_processor(videos, do_sample_frames=False, cap_pixels_per_frame=True, return_tensors="pt")
    features = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    return torch.cat(features.pooler_output)


def encode_sounds(model: nn.Module, mels: np.ndarray) -> torch.Tensor:
    """[clips * tokens, hidden] of float [clips, mel bins, frames]."""
    mels = torch.from_numpy(mels)
    mask = torch.ones(len(mels), mels.shape[2], dtype=torch.long)
    return model.get_audio_features(mels, mask).last_hidden_state


def _cut(features: torch.Tensor, batch: dict[str, list[Sample]], sorts: list[str]) -> dict[str, torch.Tensor]:
    """The features of each sort's clips."""
    sizes = [len(batch[sort]) for sort in sorts]
    tokens = len(features) // sum(sizes)
    return dict(zip(sorts, features.split([size * tokens for size in sizes]), strict=True))


def _groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay, norms, biases and embeddings do not."""
    table = find_adapter(model).find_decoder(model).get_input_embeddings().weight
    decaying = [p for p in model.parameters() if p.dim() > 1 and p is not table]
    others = [p for p in model.parameters() if p.dim() <= 1 or p is table]
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]

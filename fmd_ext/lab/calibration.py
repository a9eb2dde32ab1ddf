"""What a model's own attention says about its settings; docs/calibration.md defines and justifies the estimators."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import fmd_ext
from fmd_ext.adapters import find_adapter
from fmd_ext.config import AUTO, MODALITIES
from fmd_ext.engine.auto import alphas_of, default_depth, fading_depths, largest_depth
from fmd_ext.lab.eval.items import Item


def split_by_video(items: Sequence[Item], *counts: int) -> list[list[Item]]:
    """Parts of about ``counts`` items that have no video in common; what is in none of them stays for testing.

    Questions about one video share its picture and sound, so a part that knows the video knows more than it should.
    Videos are taken in an order of their names' hashes: the same for the same names, whatever the file's order. Where
    there are fewer items than asked for each part gets its proportion.
    """
    by_video: dict[str, list[Item]] = {}
    for item in items:
        by_video.setdefault(item.video, []).append(item)
    order = sorted(by_video, key=lambda video: hashlib.sha256(video.encode()).digest())
    share = min(1.0, len(items) / max(1, sum(counts)))
    parts: list[list[Item]] = [[] for _ in counts]
    wanted = [count * share for count in counts]
    for video in order:
        # Where most is missing: so all parts fill up together, and each gets a video where there are few.
        missing = [(count - len(part)) / count if count else 0.0 for count, part in zip(wanted, parts, strict=True)]
        if max(missing) > 0:
            parts[missing.index(max(missing))] += by_video[video]
    return [part[: round(count)] if share == 1.0 else part for count, part in zip(wanted, parts, strict=True)]


@dataclasses.dataclass(frozen=True)
class PromptReading:
    """What the last token of one prompt attends to in the fork.

    Attributes:
        layers: float32 [layers, branch, modality], see `fmd_ext.engine.auto`; layer by layer of the deepest fork.
        cluster: what the prompt shares its clip with, for the statistics.
    """

    layers: torch.Tensor
    cluster: str = ""

    def alpha(self, fork_layers: int) -> dict[str, float]:
        """The alpha that ``alpha="auto"`` chooses with that depth."""
        if not 1 <= fork_layers <= len(self.layers):
            raise ValueError(f"fork_layers must be 1 to {len(self.layers)}, which were read; got {fork_layers}")
        return dict(zip(MODALITIES, alphas_of(self.layers[:fork_layers, None])[0].tolist(), strict=True))

    @property
    def depth(self) -> int:
        """The depth that ``fork_layers="auto"`` chooses."""
        bound = largest_depth(len(self.layers))
        return int(fading_depths(self.layers[:bound, None])[0]) or bound


@torch.no_grad()
def read_prompt(
    model: nn.Module, inputs: dict[str, Any], *, mask_scale: float = 0.0, cluster: str = ""
) -> PromptReading | None:
    """Reads one prompt with all layers forked: the layers before any merge are the same for every depth.

    Args:
        model: a supported model, not patched.
        inputs: what ``generate`` takes, one sample.
        mask_scale: of the settings to be calibrated.

    Returns None for a sample that does not fork: its clip lacks picture or sound.
    """
    adapter = find_adapter(model)
    num_layers = len(adapter.find_decoder(model).layers)
    with fmd_ext.patch(model, fork_layers=num_layers, masking="zero", mask_scale=mask_scale, alpha=AUTO) as handle:
        adapter.find_entry(model)(**inputs, use_cache=False)
        reading = handle.last_call.observer
    if reading is None:
        return None
    layers = reading.layers
    if layers.shape[1] != 1:
        raise ValueError(f"prompts are read one at a time, got {layers.shape[1]}")
    return PromptReading(layers[:, 0].cpu(), cluster)


@dataclasses.dataclass(frozen=True)
class AlphaEstimate:
    """The mean alpha over prompts at one depth, per modality, with its clustered 95 % interval.

    Attributes:
        fork_layers: the depth.
        alpha: by modality, rounded to three digits.
        low, high: bounds of the intervals by modality, within 0.5 and 1, between which alpha always is.
        num_prompts, num_clusters: what it rests on.
    """

    fork_layers: int
    alpha: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    num_prompts: int
    num_clusters: int


def estimate_alpha(readings: Sequence[PromptReading], fork_layers: int) -> AlphaEstimate:
    """Raises ValueError without readings."""
    from fmd_ext.lab.eval.statistics import mean  # scipy is an extra

    if not readings:
        raise ValueError("no prompt has both picture and sound, so alpha cannot be measured")
    clusters = [reading.cluster or str(index) for index, reading in enumerate(readings)]
    found = {
        modality: mean([reading.alpha(fork_layers)[modality] for reading in readings], clusters)
        for modality in MODALITIES
    }
    return AlphaEstimate(
        fork_layers,
        {modality: round(estimate.value, 3) for modality, estimate in found.items()},
        {modality: max(0.5, estimate.low) for modality, estimate in found.items()},
        {modality: min(1.0, estimate.high) for modality, estimate in found.items()},
        len(readings),
        len(set(clusters)),
    )


def candidate_depths(num_layers: int, count: int = 6) -> list[int]:
    """Depths to try on a validation split: up to half of the layers, denser where forks are shallow."""
    bound = largest_depth(num_layers)
    spread = np.unique(np.round(np.geomspace(1, bound, count)).astype(int)).tolist()
    return sorted({*spread, default_depth(num_layers)})


@dataclasses.dataclass(frozen=True)
class DepthScore:
    """Accuracy of one depth on the validation split, and its standard error over clusters."""

    fork_layers: int
    accuracy: float
    standard_error: float


def choose_depth(scores: Iterable[DepthScore]) -> DepthScore:
    """The shallowest depth whose accuracy is within one standard error of the best one's."""
    scores = sorted(scores, key=lambda score: score.fork_layers)
    if not scores:
        raise ValueError("no depth has been tried")
    best = max(scores, key=lambda score: (score.accuracy, -score.fork_layers))
    error = 0.0 if np.isnan(best.standard_error) else best.standard_error
    return next(score for score in scores if score.accuracy >= best.accuracy - error)

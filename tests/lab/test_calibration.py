"""Readings of prompts and what is concluded from them, against what "auto" chooses in a patched model."""

from __future__ import annotations

import math

import pytest
import torch

import fmd_ext
from fmd_ext.engine import auto
from fmd_ext.lab.calibration import (
    DepthScore,
    PromptReading,
    candidate_depths,
    choose_depth,
    estimate_alpha,
    read_prompt,
    split_by_video,
)
from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.tiny import tiny_thinker
from omni_inputs import INTERLEAVED, VIDEO_AUDIO, VIDEO_ONLY, build_inputs


@pytest.fixture(scope="module")
def model():
    return tiny_thinker(seed=2, num_layers=6, hidden_size=128)


@pytest.mark.parametrize("fades", [0.5, 0.93])
@pytest.mark.parametrize("sample", [VIDEO_AUDIO, INTERLEAVED], ids=len)
def test_one_reading_tells_what_auto_chooses_at_every_depth(model, monkeypatch, sample, fades):
    monkeypatch.setattr(auto, "READING_FADES", fades)
    inputs = build_inputs([sample])
    reading = read_prompt(model, inputs, mask_scale=0.2)
    assert fmd_ext.handle_of(model) is None and reading.layers.shape == (6, 2, 2)
    for depth in (1, 3, 6):
        with fmd_ext.patch(model, fork_layers=depth, alpha="auto", mask_scale=0.2) as handle:
            model(**inputs)
            chosen = handle.last_call.home_weights[0, 1:3].tolist()
        assert list(reading.alpha(depth).values()) == pytest.approx(chosen, abs=1e-5)
    with fmd_ext.patch(model, fork_layers="auto", mask_scale=0.2) as handle:
        model(**inputs)
        assert handle.last_call.fork_layers == reading.depth


def test_a_prompt_that_does_not_fork_gives_no_reading(model):
    assert read_prompt(model, build_inputs([VIDEO_ONLY])) is None
    with pytest.raises(ValueError, match="one at a time, got 2"):
        read_prompt(model, build_inputs([VIDEO_AUDIO, VIDEO_AUDIO]))


def reading_of(alpha, cluster):
    """A reading with alpha for both modalities in its first layer, and 0.75 in its second."""
    own = 2 * alpha - 1
    first = torch.tensor([[own, 1 - own], [1 - own, own]])
    return PromptReading(torch.stack([first, torch.full((2, 2), 0.5)]), cluster)


def test_the_estimate_is_the_mean_with_a_clustered_interval():
    readings = [reading_of(a, c) for a, c in ((0.9, "a"), (0.9, "a"), (0.6, "b"), (0.8, "c"))]
    estimate = estimate_alpha(readings, 1)
    assert estimate.alpha == {"visual": 0.8, "audio": 0.8}
    assert (estimate.num_prompts, estimate.num_clusters) == (4, 3)
    assert estimate.low["visual"] < 0.8 < estimate.high["visual"]
    # Summed over both layers the second pulls towards three quarters.
    assert estimate_alpha(readings, 2).alpha["audio"] == pytest.approx((0.8 + 0.75) / 2, abs=1e-3)
    few = estimate_alpha(readings[1:3], 1)
    assert (few.low["visual"], few.high["visual"]) == (0.5, 1.0)  # two videos tell nothing: not -1.2 to 2.7
    with pytest.raises(ValueError, match="no prompt has both"):
        estimate_alpha([], 1)
    with pytest.raises(ValueError, match="must be 1 to 2, which were read; got 3"):
        readings[0].alpha(3)


def test_depths_that_are_tried():
    assert candidate_depths(28) == [1, 2, 3, 5, 7, 8, 14]
    assert candidate_depths(2) == [1]
    assert max(candidate_depths(6)) == 3


def test_the_shallowest_depth_within_one_standard_error_wins():
    scores = [
        DepthScore(4, 0.70, 0.02),
        DepthScore(1, 0.60, 0.02),
        DepthScore(8, 0.71, 0.03),
        DepthScore(2, 0.69, 0.02),
    ]
    assert choose_depth(scores).fork_layers == 2
    assert choose_depth([DepthScore(1, 0.5, math.nan), DepthScore(2, 0.6, math.nan)]).fork_layers == 2
    with pytest.raises(ValueError, match="no depth has been tried"):
        choose_depth([])


def items_about(videos, each):
    return [Item(f"{v}/{q}", f"v{v}", None, "Is it?", "yes-no", "yes") for v in range(videos) for q in range(each)]


@pytest.mark.parametrize(
    "videos, each, counts", [(40, 3, (30, 60)), (39, 4, (100, 200)), (500, 1, (100, 200)), (2, 9, (5, 5))]
)
def test_parts_share_no_video(videos, each, counts):
    items = items_about(videos, each)
    parts = split_by_video(items, *counts)
    held = [{item.video for item in part} for part in parts]
    assert not held[0] & held[1] and all(held)
    if len(items) >= sum(counts):
        assert [len(part) for part in parts] == list(counts)
    else:  # all that there is, in the proportion asked for
        assert sum(map(len, parts)) == len(items)
        assert len(parts[0]) / len(items) == pytest.approx(counts[0] / sum(counts), abs=each / len(items))
    again = split_by_video(items[::-1], *counts)
    assert [{item.video for item in part} for part in again] == held


def test_a_part_of_nothing_takes_no_video():
    items = items_about(5, 2)
    assert [len(part) for part in split_by_video(items, 4, 0)] == [4, 0]
    assert [len(part) for part in split_by_video(items, 20, 0)] == [10, 0]
    assert split_by_video([], 4, 4) == [[], []]

"""video-SALMONN 2+'s frames, sound and prompts: the same from the same clip as from the official code."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fmd_ext.inputs.chat import ClipProcessor, load_clip_for, prepare_inputs
from fmd_ext.inputs.media import Clip
from fmd_ext.lab.tiny.video_salmonn2_plus import processor_for
from fmd_ext.models.video_salmonn2_plus import VideoSalmonn2PlusConfig, VideoSalmonn2PlusProcessor
from fmd_ext.models.video_salmonn2_plus.processing import pixel_budget, sound_after_frames, spread_frames
from video_salmonn2_plus_recorded import CLIP, FIXTURES, QUESTION, RECORDED, SMALL, repeated

VIDEO, AUDIO = SMALL["video_token_id"], SMALL["audio_token_id"]
RATE = 16000


@pytest.fixture(scope="module")
def processor():
    return processor_for(VideoSalmonn2PlusConfig.from_dict(SMALL))


@pytest.fixture(scope="module")
def clip(processor):
    """The recording's clip, with the samples that the official code was given."""
    read = load_clip_for(processor, CLIP)
    wave = np.load(FIXTURES / "videollama2.npz")["wave16"]
    return part(read, audio=(wave / 2**15).astype(np.float32))


def part(clip, **changes):
    names = ("frames", "fps", "audio", "sampling_rate", "duration_s")
    return Clip(**{**{name: getattr(clip, name) for name in names}, **changes})


def official_prompt(processor, name):
    """A recorded prompt. The official code ends it three tokens into the turn of the answer: with Qwen's tokenizer at
    its line break, with the recording's after "as"."""
    rest = processor.tokenizer("sistant\n", add_special_tokens=False)["input_ids"]
    return repeated(RECORDED[name]).tolist() + rest


def noise(seconds, frames=None, fps=2.0):
    audio = np.random.default_rng(0).standard_normal(round(seconds * RATE)).astype(np.float32) * 0.1
    return Clip(frames, fps, audio, RATE, seconds)


def test_the_frames_picked_are_the_official_ones():
    ends = np.cumsum(RECORDED["numbers_of"][:, 2].astype(int))
    recorded = np.split(RECORDED["numbers"], ends[:-1])
    for (total, rate, _), numbers in zip(RECORDED["numbers_of"], recorded, strict=True):
        assert spread_frames(int(total), rate) == numbers.tolist()


def test_frames_are_scaled_to_the_official_sizes(processor):
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize

    for frames, height, width, *official in RECORDED["sizes"].tolist():
        most = int(pixel_budget(frames))
        assert list(smart_resize(height, width, 28, 4 * 28 * 28, most)) == official


def test_the_sound_between_frames_is_the_official_one():
    for grids, seconds, count, *official in json.loads(str(RECORDED["groups"])):
        assert sound_after_frames(grids, seconds, count) == official


def test_sound_that_ends_before_the_picture_leaves_its_frames_silent():
    """The official code asks for a negative number of tokens here, and fails."""
    assert sound_after_frames(4, 10.0, 60) == [20, 20, 20, 0]
    assert sound_after_frames(5, 10.0, 60) == [20, 20, 20, 0, 0]


def test_the_clip_becomes_the_official_inputs(processor, clip):
    """Pixels, log-mel window and prompt of a real file, by what the official data set made of it."""
    assert isinstance(processor, ClipProcessor) and len(clip.frames) == len(RECORDED["clip_frames"])
    assert spread_frames(85, 25.0) == RECORDED["clip_frames"].tolist()
    inputs = prepare_inputs(processor, clip, QUESTION)
    assert inputs["input_ids"][0].tolist() == official_prompt(processor, "clip_ids")
    assert inputs["video_grid_thw"].tolist() == [RECORDED["clip_grid"].tolist()]
    torch.testing.assert_close(inputs["second_per_grid_ts"], torch.tensor([2 / 10]), atol=1e-6, rtol=0)
    features = inputs["input_features"]
    assert features.shape == (1, 1, 128, 3000)
    np.testing.assert_allclose(features[0, 0, :, :340:23].numpy(), RECORDED["clip_features"], atol=1e-4)
    pixels = inputs["pixel_values_videos"][::23, ::7].numpy()
    difference = np.abs(pixels - RECORDED["clip_pixels"])
    assert difference.max() < 1e-5


def test_a_clip_of_one_part_has_the_official_prompt(processor, clip):
    silent = prepare_inputs(processor, part(clip, audio=None), QUESTION)
    assert silent["input_ids"][0].tolist() == official_prompt(processor, "clip_silent_ids")
    assert "input_features" not in silent
    heard = prepare_inputs(processor, part(clip, frames=None), QUESTION)
    assert heard["input_ids"][0].tolist() == official_prompt(processor, "sound_ids")
    assert heard.keys() == {"input_ids", "attention_mask", "input_features"}


def test_long_sound_is_heard_window_by_window(processor):
    inputs = prepare_inputs(processor, noise(61), QUESTION)
    assert inputs["input_features"].shape == (1, 3, 128, 3000) and (inputs["input_ids"] == AUDIO).sum() == 180
    alone = prepare_inputs(processor, noise(30), QUESTION)["input_features"]
    torch.testing.assert_close(inputs["input_features"][:, :1], alone)


def test_sound_follows_the_frames_that_it_belongs_to(processor):
    frames = np.zeros((6, 56, 56, 3), np.uint8)  # a pair of them every 10 s
    ids = prepare_inputs(processor, noise(30, frames, fps=0.2), QUESTION, frame_pixels=(784, 3136))["input_ids"][0]
    kinds, counts = torch.unique_consecutive(ids[(ids == VIDEO) | (ids == AUDIO)], return_counts=True)
    assert kinds.tolist() == [VIDEO, AUDIO] * 3 and counts.tolist() == [4, 20] * 3


@pytest.mark.parametrize("asked", [False, True])
def test_picture_and_sound_are_interleaved_asked_or_not(processor, clip, asked):
    ids = prepare_inputs(processor, clip, QUESTION, use_audio_in_video=asked)["input_ids"]
    assert ids[0].tolist() == official_prompt(processor, "clip_ids")


def test_the_number_of_pixels_can_be_chosen(processor, clip):
    grid = prepare_inputs(processor, clip, QUESTION, frame_pixels=(784, 784))["video_grid_thw"]
    assert grid.tolist() == [[17, 2, 2]]
    with pytest.raises(ValueError, match="frame_pixels must be"):
        prepare_inputs(processor, clip, QUESTION, frame_pixels=(2, 1))


def test_a_tokenizer_that_does_not_know_clips_is_refused(tmp_path):
    """Such as the empty one that transformers makes for a folder without a tokenizer's files."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    with pytest.raises(ValueError, match=r"does not know the token <\|video_pad\|>, which is 272 to the model"):
        VideoSalmonn2PlusProcessor.from_pretrained(tmp_path)
    config = VideoSalmonn2PlusConfig.from_dict({**SMALL, "audio_token_id": 7})
    with pytest.raises(ValueError, match=r"has at 273 the token <\|audio_pad\|>, which is 7 to the model"):
        processor_for(config)


def test_wrong_clips_and_texts_are_refused(processor, clip):
    with pytest.raises(ValueError, match="16000 samples per second, the clip has 8000"):
        prepare_inputs(processor, part(clip, sampling_rate=8000), QUESTION)
    with pytest.raises(ValueError, match="contains <video> or <audio>"):
        prepare_inputs(processor, clip, "What is <audio>?")
    with pytest.raises(
        ValueError, match=r"has the placeholders \['<video>', '<video>'\], its clips need \['<video>'\]"
    ):
        processor(["<video><video>"], [[clip]])
    with pytest.raises(ValueError, match="text that stands for a placeholder"):
        prepare_inputs(processor, clip, "What is <|audio_pad|>?")

"""video-SALMONN 2's frames, sound and prompts: the same from the same clip as from the official code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoProcessor

from fmd_ext.inputs.chat import ClipProcessor, load_clip_for, prepare_batch, prepare_inputs
from fmd_ext.inputs.media import Clip
from fmd_ext.models.video_salmonn2 import VideoSalmonn2Processor
from fmd_ext.models.video_salmonn2.processing import shares_of_sound
from video_salmonn2_recorded import CLIP, FIXTURES, QUESTION, RECORDED, SMALL, tokenizer, write_official_folder

VIDEO, AUDIO, BLANK = SMALL["vocab_size"] - 2, SMALL["vocab_size"] - 1, SMALL["vocab_size"] - 3


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("video_salmonn2") / "model"
    return AutoProcessor.from_pretrained(write_official_folder(folder, {"none": torch.zeros(1)}))


@pytest.fixture(scope="module")
def clip(processor):
    return load_clip_for(processor, CLIP)


def part(clip, **changes):
    fields = ("frames", "fps", "audio", "sampling_rate", "duration_s")
    return Clip(**{**{name: getattr(clip, name) for name in fields}, **changes})


def test_a_folder_without_processor_files_gives_the_processor(processor):
    assert type(processor) is VideoSalmonn2Processor and isinstance(processor, ClipProcessor)
    assert (processor.num_frame_tokens, processor.num_sound_tokens) == (182, 60)
    assert processor.feature_extractor.n_samples == 30 * 16000


def test_the_frames_picked_are_the_official_ones(processor):
    """Odd rates, less than a frame per second, more frames than are seen."""
    ours = [processor.pick(int(total), rate) for total, rate in RECORDED["specs"].tolist()]
    assert [len(numbers) for numbers in ours] == RECORDED["frame_counts"].tolist()
    assert sum(ours, []) == RECORDED["frame_numbers"].tolist()


def test_frames_per_second_can_be_chosen(tmp_path):
    folder = write_official_folder(tmp_path / "model", {"none": torch.zeros(1)})
    processor = AutoProcessor.from_pretrained(folder, fps=2, max_seconds=3)
    assert processor.pick(100, 25.0) == [0, 19, 39, 59, 79, 99]
    assert processor.pick(60, 25.0) == [0, 12, 24, 36, 48]
    processor.save_pretrained(folder)
    again = AutoProcessor.from_pretrained(folder)
    assert (again.fps, again.max_seconds) == (2, 3)
    assert AutoProcessor.from_pretrained(folder, fps=1).fps == 1


def test_pixels_equal_the_official_ones(processor, clip):
    assert len(clip.frames) == 4 and len(clip.frames) / clip.fps == pytest.approx(float(RECORDED["real_time"]))
    pixels = prepare_inputs(processor, clip, QUESTION)["pixel_values_videos"][0]
    assert pixels.shape == (4, 3, 54, 54) and pixels.dtype == torch.float32
    official = (torch.from_numpy(RECORDED["pixels"]).float() / 255 - 0.5) / 0.5
    difference, step = (pixels[:, :, ::2, ::2] - official).abs(), 2 / 255  # one in 256 shades
    assert difference.max() <= 3.01 * step and difference.mean() < 0.5 * step
    assert (pixels[0, :, ::2, ::2] - official[1]).abs().mean() > 3 * step  # other frames would be seen


def test_the_sound_equals_the_official_one(processor, clip):
    """Of the same samples; the official code reads them from a file of 16 bit."""
    wave = (np.load(FIXTURES / "videollama2.npz")["wave16"] / 2**15).astype(np.float32)
    features = prepare_inputs(processor, part(clip, audio=wave), QUESTION)["input_features"]
    assert features.shape == (1, 1, 16, 3000)
    np.testing.assert_allclose(features[0, 0, :, :400:5].numpy(), RECORDED["log_mel"], atol=1e-4)


def test_prompts_equal_the_official_ones(processor, clip):
    """The token of two line breaks is not in them: the first one belongs to the clip."""
    for own, name in ((clip, "prompt"), (part(clip, frames=None), "prompt_heard")):
        inputs = prepare_inputs(processor, own, QUESTION)
        ids = inputs["input_ids"][0].tolist()
        official = RECORDED[name].tolist()
        where = official.index(-200)
        of_clip = ids[where : where + len(ids) - len(official) + 1]
        assert ids == official[:where] + of_clip + official[where + 1 :]
        assert set(of_clip) == ({VIDEO, AUDIO} if own.frames is not None else {AUDIO})
    text = prepare_batch(processor, [([], QUESTION)])["input_ids"]
    assert text.tolist() == [RECORDED["prompt_text"].tolist()]


def test_each_frame_is_followed_by_its_share_of_the_sound(processor, clip):
    ids = prepare_inputs(processor, clip, QUESTION)["input_ids"][0]
    places = ids[(ids == VIDEO) | (ids == AUDIO)]
    assert places.tolist() == ([VIDEO] * 182 + [AUDIO] * 15) * 4


@pytest.mark.parametrize("tokens, frames, seconds", [(60, 7, 7.3), (120, 110, 110.0), (60, 2, 0.9), (60, 1, 0.001)])
def test_shares_of_sound(tokens, frames, seconds):
    """Every token stands somewhere, in order; only what is behind the picture's end is behind the last frame."""
    share, order = shares_of_sound(tokens, frames, seconds)
    front = min(tokens, max(round(50 * seconds), 1))
    assert share == -(-front // frames) and len(order) == share * frames + tokens - front
    assert order.unique().tolist() == list(range(tokens)) and order.tolist() == sorted(order.tolist())
    assert order[share * frames :].tolist() == list(range(front, tokens))


def test_sound_no_longer_than_the_picture_is_heard(processor, clip):
    wave = np.tile(clip.audio, 20)
    ours = prepare_inputs(processor, part(clip, audio=wave), QUESTION)["input_features"]
    cut = prepare_inputs(processor, part(clip, audio=wave[: round(16000 * 3.4)]), QUESTION)["input_features"]
    assert ours.shape == (1, 1, 16, 3000) and torch.equal(ours, cut)
    long = np.tile(clip.audio, 40)
    with pytest.warns(UserWarning, match=f"hears only the first 110 s of {len(long) / 16000:.1f} s of sound"):
        alone = prepare_inputs(processor, part(clip, frames=None, audio=long), QUESTION)
    assert alone["input_features"].shape == (1, 4, 16, 3000)
    assert (alone["input_ids"] == AUDIO).sum() == 240 and alone["sound_order"].tolist() == [list(range(240))]


def test_a_silent_clips_frames_are_followed_by_their_times(processor, clip):
    frames = np.repeat(clip.frames[:1], 11, axis=0)
    inputs = prepare_inputs(processor, part(clip, frames=frames, fps=1.0, audio=None), QUESTION)
    assert "input_features" not in inputs and "sound_order" not in inputs
    ids = inputs["input_ids"][0].tolist()
    start = ids.index(VIDEO)
    times = [ids[start + 186 * i + 182 : start + 186 * (i + 1)] for i in range(11)]
    texts = [processor.tokenizer.decode([token for token in time if token != BLANK]) for time in times]
    assert texts == [f"{second}.0" for second in range(1, 12)]
    assert [time.count(BLANK) for time in times] == [1] * 9 + [0] * 2
    untimed = VideoSalmonn2Processor.from_config(
        AutoConfig.for_model(**{**SMALL, "model_args": {}, "mm_spatial_pool_mode": "max", "add_time_token": False}),
        tokenizer(),
    )
    ids = prepare_inputs(untimed, part(clip, audio=None), QUESTION)["input_ids"][0]
    assert (ids == VIDEO).diff().sum() == 2 and (ids == VIDEO).sum() == 4 * 182


def test_what_it_does_not_know_is_refused(processor, clip):
    with pytest.raises(ValueError, match="sees frames of one size only"):
        prepare_inputs(processor, clip, QUESTION, frame_pixels=(1, 2))
    with pytest.raises(ValueError, match="16000 samples per second, the clip has 8000"):
        prepare_inputs(processor, part(clip, sampling_rate=8000), QUESTION)
    with pytest.raises(ValueError, match="contains <image>"):
        prepare_inputs(processor, clip, "What is <image>?")
    with pytest.raises(ValueError, match="about one clip, got 2"):
        prepare_inputs(processor, [clip, clip], QUESTION)
    assert prepare_inputs(processor, clip, QUESTION, use_audio_in_video=True)["sound_order"].shape == (1, 60)

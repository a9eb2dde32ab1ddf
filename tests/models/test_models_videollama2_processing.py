"""VideoLLaMA2's frames, sound and prompts: the same from the same clip as from the official code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from fmd_ext.inputs.chat import ClipProcessor, load_clip_for, prepare_inputs
from fmd_ext.inputs.frames import middles
from fmd_ext.inputs.media import Clip
from fmd_ext.models.videollama2 import VideoLlama2Processor
from fmd_ext.models.videollama2.processing import window_cuts
from videollama2_recorded import CLIP, KINDS, QUESTION, RECORDED, SMALL, write_official_folder

VIDEO, AUDIO = SMALL["vocab_size"] - 2, SMALL["vocab_size"] - 1  # placeholders' ids with Qwen2
SOUND_TOKENS = (2998 // 16) * 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videollama2")
    return {kind: write_official_folder(folder / kind, kind, {"none": torch.zeros(1)}) for kind in KINDS}


@pytest.fixture(scope="module")
def processors(folders):
    return {kind: AutoProcessor.from_pretrained(folder) for kind, folder in folders.items()}


@pytest.fixture
def processor(processors):
    return processors["qwen2"]


@pytest.fixture(scope="module")
def clip(processors):
    return load_clip_for(processors["qwen2"], CLIP)


def part(clip, **changes):
    return Clip(
        **{**{n: getattr(clip, n) for n in ("frames", "fps", "audio", "sampling_rate", "duration_s")}, **changes}
    )


def test_a_folder_without_processor_files_gives_the_processor(processor):
    assert type(processor) is VideoLlama2Processor and isinstance(processor, ClipProcessor)
    assert processor.clip_arguments["num_frames"] == processor.num_frames == 4


def test_the_frames_picked_are_the_official_ones():
    lengths = ((85, 4), (85, 16), (1000, 8), (5, 8), (1, 4), (17, 16))
    ours = [number for total, count in lengths for number in middles(total, count)]
    assert ours == RECORDED["frame_numbers"].tolist()


def test_frames_of_the_right_number_are_left_alone():
    assert all(middles(count, count) == list(range(count)) for count in range(1, 65))


def test_the_windows_heard_are_the_official_ones():
    lengths = (8000, 32000, 54400, 16000 * 10 + 137, 16000 * 61 + 5001)
    assert [window_cuts(n) for n in lengths] == [[tuple(cut) for cut in cuts] for cuts in RECORDED["cuts"].tolist()]


def test_the_clip_is_read_as_the_official_code_reads_it(clip):
    """decord and ffmpeg there, PyAV here: the same frames, the same samples up to rounding.

    The first 20 ms of an AAC sound depend on what a decoder makes of the silence before it; at its end PyAV before 19
    gives what fills up the last block, which ffmpeg cuts off.
    """
    official = RECORDED["wave16"]
    assert clip.frames.shape[0] == 4 and 0 <= len(clip.audio) - len(official) < 1024
    difference = np.abs(clip.audio[: len(official)] * 2.0**15 - official)[350:-20]
    assert difference.max() < 2


@pytest.mark.parametrize("kind, recorded", [("qwen2", "pixels"), ("mistral", "clip_pixels")])
def test_pixels_equal_the_official_ones(processors, clip, kind, recorded):
    pixels = prepare_inputs(processors[kind], clip, QUESTION)["pixel_values_videos"][0, 0]
    assert pixels.shape == (4, 3, 70, 70) and pixels.dtype == torch.float32
    if kind == "qwen2":
        official = (torch.from_numpy(RECORDED[recorded]).float() / 255 - 0.5) / 0.5
        step = 2 / 255  # of one in 256 shades
    else:
        official, pixels = torch.from_numpy(RECORDED[recorded]), pixels[:, :, ::5, ::5]
        step = 1 / 255 / 0.26
    difference = (pixels - official).abs()
    assert difference.max() <= 3.01 * step and difference.mean() < 0.5 * step
    assert (pixels[0] - official[1]).abs().mean() > 3 * step  # other frames would be seen


def test_the_filter_bank_equals_the_official_one(processor, clip):
    """Of the same samples, rounded to bfloat16 by both: at most one step apart, and few of them."""
    wave = (RECORDED["wave16"] / 2**15).astype(np.float32)
    features = prepare_inputs(processor, part(clip, audio=wave), QUESTION)["input_features"]
    assert features.shape == (1, 1, 2998, 128)
    assert torch.equal(features, features.to(torch.bfloat16).float())
    ours, official = features[0, 0, ::29].numpy(), RECORDED["fbank"]
    np.testing.assert_allclose(ours, official, rtol=2**-7, atol=1e-2)
    assert (ours == official).mean() > 0.98
    # What was read from the file differs in its last milliseconds, which moves the windows a little.
    read = prepare_inputs(processor, clip, QUESTION)["input_features"][0, 0, ::29].numpy()
    assert np.abs(read - official).mean() < 0.25 * official.std()


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_equal_the_official_ones(processors, clip, kind):
    processor = processors[kind]
    ids = prepare_inputs(processor, clip, QUESTION)["input_ids"][0].tolist()
    of_clip = [processor.video_token_id] * processor.num_video_tokens + [processor.audio_token_id] * SOUND_TOKENS
    official = RECORDED[f"{kind}_ids"].tolist()
    where = official.index(-201)
    assert ids == official[:where] + of_clip + official[where + 1 :]


def test_sound_alone_is_heard_from_its_start(processor, clip):
    """The official code cuts 30 s out of longer sounds at random."""
    inputs = prepare_inputs(processor, part(clip, frames=None), QUESTION)
    assert "pixel_values_videos" not in inputs and (inputs["input_ids"] == AUDIO).sum() == SOUND_TOKENS
    long = part(clip, frames=None, audio=np.tile(clip.audio, 12), duration_s=40.0)
    seconds = len(long.audio) / long.sampling_rate
    with pytest.warns(UserWarning, match=rf"hears only the first 30 s of {seconds:.1f} s of sound"):
        longer = prepare_inputs(processor, long, QUESTION)
    heard = inputs["input_features"][0, 0, :300]
    torch.testing.assert_close(longer["input_features"][0, 0, :300], heard)


def test_picture_alone_brings_no_sound(processor, clip):
    inputs = prepare_inputs(processor, part(clip, audio=None), QUESTION)
    assert "input_features" not in inputs and (inputs["input_ids"] == VIDEO).sum() == processor.num_video_tokens


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_audio_in_video": True}, "it cannot interleave"),
        ({"frame_pixels": (1, 2)}, "sees frames of one size only"),
    ],
)
def test_options_that_it_does_not_know_are_refused(processor, clip, options, message):
    with pytest.raises(ValueError, match=message):
        prepare_inputs(processor, clip, QUESTION, **options)


def test_wrong_clips_and_texts_are_refused(processor, clip):
    with pytest.raises(ValueError, match="16000 samples per second, the clip has 8000"):
        prepare_inputs(processor, part(clip, sampling_rate=8000), QUESTION)
    with pytest.raises(ValueError, match="contains <video> or <audio>"):
        prepare_inputs(processor, clip, "What is <audio>?")
    with pytest.raises(ValueError, match="has 2 <video> and 0 <audio>, its clips have 1 pictures and 1 sounds"):
        processor(["<video><video>"], [[clip]])


def test_text_that_is_tokenized_to_a_placeholder_is_refused(processors, clip):
    processor = processors["mistral"]  # its vocabulary is full: the ids of two rare tokens stand for clips
    text = processor.tokenizer.decode([processor.audio_token_id])
    with pytest.raises(ValueError, match="text that stands for a placeholder"):
        prepare_inputs(processor, clip, f"What is {text}?")

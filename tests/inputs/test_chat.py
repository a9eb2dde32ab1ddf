"""The seam for models whose processor is ours: every function of fmd_ext.inputs.chat goes through what it offers."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch

from fmd_ext.inputs.chat import (
    ClipProcessor,
    last_question_token,
    load_clip_for,
    prepare_batch,
    prepare_inputs,
    speech_inputs,
)
from fmd_ext.inputs.media import Clip
from fmd_ext.lab.tiny import tiny_processor, tiny_thinker, write_clip
from fmd_ext.lab.tiny.processor import tiny_qwen3_processor
from fmd_ext.lab.tiny.qwen3_omni import tiny_qwen3_thinker


class Echo:
    """A processor that keeps what it is told."""

    clip_arguments = {"num_frames": 3}

    def __init__(self):
        self.tokenizer = tiny_processor().tokenizer

    def render(self, clips, question, system_prompt):
        return f"<{len(clips)}>{system_prompt}:{question}. Answer:"

    def prepare_clips(self, conversations, **options):
        self.told = options
        texts = [self.render(clips, question, options["system_prompt"]) for clips, question in conversations]
        return dict(self.tokenizer(texts, return_tensors="pt", padding=True))


@pytest.fixture
def clip():
    return Clip(np.zeros((2, 8, 8, 3), np.uint8), 1.0, None, 16000, 2.0)


def test_the_built_in_processor_is_no_clip_processor():
    assert isinstance(Echo(), ClipProcessor) and not isinstance(tiny_processor(), ClipProcessor)


def test_one_question_and_several_go_through_the_processor(clip):
    processor = Echo()
    inputs = prepare_inputs(processor, clip, "Why?", use_audio_in_video=True, frame_pixels=(1, 2))
    assert processor.told == {"use_audio_in_video": True, "system_prompt": None, "frame_pixels": (1, 2)}
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == "<1>None:Why?. Answer:"
    batch = prepare_batch(processor, [([clip, clip], "Why?"), ([], "Who is it?")], system_prompt="Be brief")
    assert [processor.tokenizer.decode(row, skip_special_tokens=True) for row in batch["input_ids"]] == [
        "<2>Be brief:Why?. Answer:",
        "<0>Be brief:Who is it?. Answer:",
    ]


def test_the_last_question_token_is_found(clip):
    processor = Echo()
    ids = prepare_inputs(processor, clip, "Why?")["input_ids"][0]
    index = last_question_token(processor, "Why?")
    assert processor.tokenizer.decode(ids[: len(ids) + index + 1]).endswith("Why?")
    assert torch.equal(ids[index + 1 :], torch.tensor(processor.tokenizer(". Answer:")["input_ids"]))


def test_a_question_that_is_in_the_system_prompt_too_is_found_where_it_is_asked(clip):
    processor = tiny_processor()
    question = "You are a helpful assistant."
    ids = prepare_inputs(processor, clip, question)["input_ids"][0]
    ends = ids[: len(ids) + last_question_token(processor, question) + 1]
    text = processor.tokenizer.decode(ends)
    assert text.endswith(question) and text.count(question) == 2


def test_the_frame_rate_reaches_the_model():
    """A pair of frames stands for two seconds at one frame per second; positions count by that."""
    for fps, seconds in ((1.0, 2.0), (4.0, 0.5)):
        clip = Clip(np.zeros((4, 56, 56, 3), np.uint8), fps, None, 16000, 4 / fps)
        assert prepare_inputs(tiny_processor(), clip, "Why?")["video_second_per_grid"].tolist() == [seconds]


def test_pixels_of_speech_are_the_thinkers():
    given = {"input_ids": 1, "pixel_values": 2, "pixel_values_videos": 3, "input_features": 4}
    expected = {"input_ids": 1, "thinker_pixel_values": 2, "thinker_pixel_values_videos": 3, "input_features": 4}
    assert speech_inputs(given) == expected


@pytest.mark.parametrize("question", ["", " \n", None])
def test_an_empty_question_is_refused(clip, question):
    with pytest.raises(ValueError, match="the question is empty"):
        prepare_inputs(Echo(), clip, question)
    with pytest.raises(ValueError, match="the question is empty"):
        last_question_token(Echo(), question)


def test_clips_are_read_as_the_model_wants_them(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", seconds=1.0)
    assert len(load_clip_for(Echo(), path, fps=10.0, max_frames=100).frames) == 3
    assert len(load_clip_for(tiny_processor(), path, fps=10.0).frames) == 10


@pytest.mark.parametrize("make", [(tiny_thinker, tiny_processor), (tiny_qwen3_thinker, tiny_qwen3_processor)])
@pytest.mark.parametrize("samples", [1, 100, 320, 400])
def test_sound_shorter_than_a_window_is_padded_with_silence(make, samples):
    model, processor = (one() for one in make)
    clip = Clip(np.zeros((4, 56, 56, 3), np.uint8), 2.0, np.full(samples, 0.1, np.float32), 16000, 2.0)
    padded = dataclasses.replace(clip, audio=np.pad(clip.audio, (0, 400 - samples)))
    given, expected = (prepare_inputs(processor, one, "What?") for one in (clip, padded))
    assert given.keys() == expected.keys() and all(torch.equal(given[name], expected[name]) for name in given)
    assert model.generate(**given, max_new_tokens=1, do_sample=False).shape[1] == given["input_ids"].shape[1] + 1


def test_what_is_not_heard_is_measured():
    """Qwen2.5-Omni's processor cuts the sound at its extractor's window; Qwen3-Omni's hears all of it."""
    clip = Clip(None, 1.0, np.zeros(33 * 16000, np.float32), 16000, 33.0)
    with pytest.warns(UserWarning, match="hears only the first 30 s of 33.0 s of sound"):
        inputs = prepare_inputs(tiny_processor(), clip, "What?")
    assert inputs["feature_attention_mask"].sum() == 3000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs = prepare_inputs(tiny_qwen3_processor(), clip, "What?")
        prepare_inputs(tiny_processor(), dataclasses.replace(clip, audio=clip.audio[: 30 * 16000 + 159]), "What?")
    assert inputs["feature_attention_mask"].sum() == 3300

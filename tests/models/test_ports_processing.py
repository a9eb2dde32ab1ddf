"""Prompts and batches of the ports' processors, on small models in the official layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

import video_salmonn2_plus_recorded as plus
import video_salmonn2_recorded as salmonn2
import videollama2_recorded as videollama2
from fmd_ext.inputs.chat import ClipProcessor, last_question_token, load_clip_for, prepare_batch, prepare_inputs
from fmd_ext.inputs.media import Clip
from fmd_ext.models.video_salmonn2_plus import VideoSalmonn2PlusProcessor

QUESTION = videollama2.QUESTION
NO_WEIGHTS = {"none": torch.zeros(1)}
PORTS = {
    "videollama2_qwen2": (AutoProcessor, lambda f: videollama2.write_official_folder(f, "qwen2", NO_WEIGHTS), {}),
    "videollama2_mistral": (AutoProcessor, lambda f: videollama2.write_official_folder(f, "mistral", NO_WEIGHTS), {}),
    "video_salmonn2": (AutoProcessor, lambda f: salmonn2.write_official_folder(f, NO_WEIGHTS), {}),
    "video_salmonn2_plus": (
        VideoSalmonn2PlusProcessor,
        lambda f: plus.write_official_folder(f, NO_WEIGHTS),
        {"frame_pixels": (784, 784)},
    ),
}
# Features that have a row for each sample, and those that lie one behind the other.
STACKED = {
    "videollama2_qwen2": ("pixel_values_videos", "input_features"),
    "videollama2_mistral": ("pixel_values_videos", "input_features"),
    "video_salmonn2": ("pixel_values_videos", "input_features", "sound_order"),
    "video_salmonn2_plus": ("input_features",),
}
JOINED = {"video_salmonn2_plus": ("pixel_values_videos", "video_grid_thw")}


@pytest.fixture(scope="module", params=PORTS)
def port(request, tmp_path_factory):
    """The port's name, its processor, and options for small pictures."""
    loader, write, options = PORTS[request.param]
    folder = write(tmp_path_factory.mktemp(request.param) / "model")
    return request.param, loader.from_pretrained(folder), options


@pytest.fixture(scope="module")
def clip(port):
    return load_clip_for(port[1], videollama2.CLIP)


def part(clip, **changes):
    names = ("frames", "fps", "audio", "sampling_rate", "duration_s")
    return Clip(**{**{name: getattr(clip, name) for name in names}, **changes})


def test_the_last_question_token(port, clip):
    _, processor, options = port
    assert isinstance(processor, ClipProcessor)
    ids = prepare_inputs(processor, clip, QUESTION, **options)["input_ids"][0]
    index = last_question_token(processor, QUESTION)
    assert processor.tokenizer.decode(ids[: len(ids) + index + 1]).endswith(QUESTION)


def test_a_system_prompt_replaces_the_models_own(port, clip):
    text = port[1].render([clip], QUESTION, "Be brief.")
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>") and "helpful" not in text


def test_a_batch_is_padded_on_the_left_and_clips_stay_with_their_samples(port, clip):
    """What a sample does not have is zero; where a model takes several clips, one has two."""
    name, processor, options = port
    few = slice(0, 2 if name == "video_salmonn2_plus" else None)  # 2+ sees pairs of frames: another number of them
    seen_only = part(clip, frames=np.zeros_like(clip.frames[few]), audio=None)
    heard_only = part(clip, frames=None)
    several = {
        "videollama2_qwen2": [clip, seen_only],
        "videollama2_mistral": [clip, seen_only],
        "video_salmonn2": [clip],
        "video_salmonn2_plus": [clip, part(clip, frames=None, audio=np.tile(clip.audio, 10))],
    }[name]
    conversations = [(several, "One?"), ([], "Two words?"), ([heard_only], "Three?"), ([seen_only], "Four?")]
    batch = prepare_batch(processor, conversations, **options)
    alone = [prepare_batch(processor, [conversation], **options) for conversation in conversations]
    for row, mask, own in zip(batch["input_ids"], batch["attention_mask"], alone, strict=True):
        assert row[mask.bool()].tolist() == own["input_ids"][0].tolist() and mask.sum() == own["attention_mask"].sum()
        assert mask.sort().values.equal(mask)
    for feature in JOINED.get(name, ()):
        assert torch.equal(batch[feature], torch.cat([own[feature] for own in alone if feature in own]))
    for feature in STACKED[name]:
        counts = [own[feature].shape[1] if feature in own else 0 for own in alone]
        assert batch[feature].shape[:2] == (4, max(counts)) and counts[1] == 0 < max(counts)
        for row, count, own in zip(batch[feature], counts, alone, strict=True):
            assert not count or torch.equal(row[:count], own[feature][0])
            assert not row[count:].any()

"""Prompts without a modality, and with a question appended: what they are, and that decoding goes on from them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fmd_ext.adapters import AUDIO, VISUAL
from fmd_ext.compat import cache_of
from fmd_ext.engine.reference import decoder_inputs
from fmd_ext.inputs.chat import prepare_batch, prepare_inputs
from fmd_ext.lab.baselines import drop, mad, method_of
from fmd_ext.lab.baselines.prompts import closing_ids, with_question, without
from fmd_ext.lab.tiny import TOKEN_IDS, tiny_processor
from fmd_ext.lab.tiny.processor import tiny_qwen3_processor
from fmd_ext.lab.tiny.qwen3_omni import tiny_qwen3_thinker
from omni_inputs import TWO_CLIPS, VIDEO_AUDIO, WITH_IMAGE, build_inputs
from ports import PORTS, clip
from recomputed import Oracle, build_questions, lacking, softmax

QUESTION = "Is it loud?"
PARTS = {"video": VISUAL, "audio": AUDIO}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(audio_seconds=2)


def same(given, expected):
    """The same arguments, those that are None or False left out."""
    given, expected = (
        {n: v for n, v in call.items() if v is not None and v is not False} for call in (given, expected)
    )
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(torch.as_tensor(given[name]), torch.as_tensor(value), atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("lost", ["video", "audio"])
def test_a_dropped_modality_is_as_if_the_clip_lacked_it(thinker, processor, lost, interleaved):
    whole = clip(0)
    rest = dataclasses.replace(whole, **{"frames" if lost == "video" else "audio": None})
    call = prepare_inputs(processor, whole, QUESTION, use_audio_in_video=interleaved)
    same(without(thinker, call, (PARTS[lost],)), prepare_inputs(processor, rest, QUESTION))


def test_without_both_it_is_a_prompt_of_the_question_alone(thinker, processor):
    call = prepare_inputs(processor, clip(0), QUESTION)
    same(without(thinker, call, (VISUAL, AUDIO)), prepare_inputs(processor, [], QUESTION))


@pytest.mark.parametrize("lost", ["video", "audio"])
def test_qwen3_omni_too(lost):
    """Its configuration does not name the tokens that end a clip."""
    model, processor = tiny_qwen3_thinker(seed=0), tiny_qwen3_processor()
    whole = clip(0, size=(64, 64))
    rest = dataclasses.replace(whole, **{"frames" if lost == "video" else "audio": None})
    same(without(model, prepare_inputs(processor, whole, QUESTION), (PARTS[lost],)),
         prepare_inputs(processor, rest, QUESTION))  # fmt: skip


def test_samples_of_a_batch_take_their_clips_with_them(thinker):
    """Several clips in one sample, and images; none of a neighbour's."""
    batch = [TWO_CLIPS, VIDEO_AUDIO, TWO_CLIPS]
    inputs = build_inputs(batch)
    same(without(thinker, inputs, (AUDIO,), [1]), lacking(inputs, batch, 1, ("audio",)))
    same(without(thinker, inputs, (VISUAL,), [2]), lacking(inputs, batch, 2, ("video",)))
    two = without(thinker, inputs, (), [2, 0])
    for place, index in enumerate((2, 0)):
        there, before = two["attention_mask"][place] == 1, inputs["attention_mask"][index] == 1
        assert torch.equal(two["input_ids"][place, there], inputs["input_ids"][index, before])
    clips = torch.tensor([3, 4, 0, 1])
    assert torch.equal(two["input_features"], inputs["input_features"][clips])
    assert torch.equal(two["video_grid_thw"], inputs["video_grid_thw"][clips])
    pictured = build_inputs([VIDEO_AUDIO, WITH_IMAGE])
    alone = without(thinker, pictured, (AUDIO,), [1])
    assert torch.equal(alone["pixel_values"], pictured["pixel_values"]) and alone["pixel_values_videos"] is None
    ids = pictured["input_ids"][1][pictured["attention_mask"][1] == 1]
    sound = torch.tensor([TOKEN_IDS[f"audio_{name}"] for name in ("token", "bos_token", "eos_token")])
    assert torch.equal(alone["input_ids"][0], ids[~torch.isin(ids, sound)])


def test_a_question_is_appended_before_the_end_of_the_turn(processor):
    call = prepare_batch(processor, [([clip(0)], QUESTION), ([clip(1)], "Why?")])
    more = processor.tokenizer(" Say so.")["input_ids"]
    longer = with_question(call, more, closing_ids(processor))
    expected = prepare_batch(processor, [([clip(0)], QUESTION + " Say so."), ([clip(1)], "Why? Say so.")])
    same(longer, expected)
    padded_on_the_right = {**call, "attention_mask": call["attention_mask"].flip(1)}
    for wrong in (build_inputs([VIDEO_AUDIO]), padded_on_the_right):
        with pytest.raises(ValueError, match="does not end as the processor's chat template ends a question"):
            with_question(wrong, more, closing_ids(processor))


def test_what_is_refused(thinker, processor):
    call = {**prepare_inputs(processor, clip(0), QUESTION), "mm_encoder_outputs": {"video": torch.zeros(1)}}
    with pytest.raises(ValueError, match="give its pixels and sound, not mm_encoder_outputs"):
        without(thinker, call, (AUDIO,))
    inputs = build_inputs([VIDEO_AUDIO, VIDEO_AUDIO])
    more = {**inputs, "video_grid_thw": inputs["video_grid_thw"][:1]}
    with pytest.raises(ValueError, match="the grids do not belong to the placeholders"):
        without(thinker, more, (AUDIO,), [0])


@pytest.mark.parametrize("name", ["videollama2_qwen2", "video_salmonn2", "video_salmonn2_plus_inference"])
@pytest.mark.parametrize("need", ["visual", "audio"])
def test_ports_whose_features_belong_to_samples(name, need):
    """A batch whose samples need different modalities answers as its samples do alone."""
    port = PORTS[name]
    whole, samples = port.batch("padded"), port.samples("padded")
    other = {"visual": "audio", "audio": "visual"}[need]
    with drop(port.model, needs=[need, other]):
        together = port.model(**whole).logits[:, -1]
        assert [list(note) for note in method_of(port.model).notes] == [
            ["audio dropped" if need == "visual" else "video dropped"],
            ["audio dropped" if other == "visual" else "video dropped"],
        ]
    for sample, own_need, found in zip(samples, (need, other), together, strict=True):
        with drop(port.model, needs=own_need):
            alone = port.model(**sample).logits[0, -1]
        assert not torch.allclose(alone, port.model(**sample).logits[0, -1], atol=1e-3)
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["mad", "drop"])
def test_answers_of_qwen3_omni_in_a_batch_are_those_alone(name):
    """With sounds of one length: beside a longer one its encoder gives 1e-3 other features, unpatched too."""
    model, processor = tiny_qwen3_thinker(seed=0), tiny_qwen3_processor()
    about = [([clip(0, size=(64, 64))], QUESTION), ([clip(1, size=(64, 64))], "What is the red disc?")]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "output_logits": True}

    def logits(conversations, needs):
        context = drop(model, needs=needs) if name == "drop" else mad(model, processor=processor)
        with context:
            inputs = prepare_batch(processor, conversations)
            return torch.stack(model.generate(**inputs, **options, return_dict_in_generate=True).logits, 1)

    together = logits(about, ["audio", "visual"])
    for found, conversation, need in zip(together, about, ["audio", "visual"], strict=True):
        torch.testing.assert_close(found, logits([conversation], [need])[0], atol=3e-4, rtol=0)


@pytest.mark.parametrize("name", ["mad", "drop"])
def test_a_second_turn_goes_on_from_the_prompts_that_were_run(thinker, name):
    """Its tokens get the positions behind the shorter prompts."""
    processor = tiny_processor()
    batch = [VIDEO_AUDIO]
    inputs = build_questions(batch, processor)
    words = [40, 41, 42]

    def lacking_logits(kinds):
        return Oracle(thinker, decoder_inputs(thinker, **lacking(inputs, batch, 0, kinds)), 0).logits(softmax, words)

    if name == "drop":
        context, expected = drop(thinker, needs="visual"), lacking_logits(("audio",))
    else:
        context = mad(thinker, processor=processor, gamma=0.0)
        expected = 2 * lacking_logits(()) + lacking_logits(("audio",)) + lacking_logits(("video",))
        expected = expected / 4
    with context:
        cache = cache_of(thinker(**inputs))
        found = thinker(torch.tensor([words]), past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)

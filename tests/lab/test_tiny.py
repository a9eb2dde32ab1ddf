"""The random-weight models and their processor, and how a clip and a question become a model's inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    AutoProcessor,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from fmd_ext.cli.models import RANDOM_MARK
from fmd_ext.inputs.chat import last_question_token, prepare_batch, prepare_inputs, speech_inputs
from fmd_ext.inputs.media import Clip, load_clip
from fmd_ext.lab.tiny import (
    SPECIAL_TOKENS,
    TOKEN_IDS,
    VOCAB_SIZE,
    save_random_model,
    tiny_omni,
    tiny_processor,
    tiny_thinker,
    tiny_thinker_config,
    write_clip,
)

SMALL = {"frame_pixels": (4 * 28 * 28, 4 * 28 * 28)}  # at most four visual tokens for two frames
QUESTION = "What is this?"


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Five seconds and three seconds with picture and sound, then one without sound, then one without picture."""
    folder = tmp_path_factory.mktemp("clips")
    settings = {
        "long": {"seconds": 5.0},
        "short": {"seconds": 3.3, "seed": 1},
        "silent": {"seconds": 2.0, "sound": False},
        "blind": {"seconds": 2.0, "picture": False},
    }
    return {name: load_clip(write_clip(folder / f"{name}.mp4", **chosen)) for name, chosen in settings.items()}


def count(inputs, token):
    return int((inputs["input_ids"] == TOKEN_IDS[token]).sum())


def answer(model, inputs, tokens=4):
    return model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[:, inputs["input_ids"].shape[1] :]


def audio_tokens(inputs):
    """What the model makes of the sound's mel frames: two halvings."""
    frames = inputs["feature_attention_mask"].sum(-1)
    return int((((frames - 1) // 2 + 1 - 2) // 2 + 1).sum())


# --- the models -----------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_weights_and_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    one, same, other = tiny_thinker(3), tiny_thinker(3), tiny_thinker(4)
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not one.training and weights[0].isfinite().all()


def test_the_default_model_is_small_and_has_grouped_heads_of_64():
    model = tiny_thinker()
    text = model.config.text_config
    assert text.hidden_size // text.num_attention_heads == 64
    assert text.num_attention_heads == 2 * text.num_key_value_heads
    assert sum(p.numel() for p in model.parameters()) * 4 < 10e6
    assert VOCAB_SIZE < 1000 and text.vocab_size == VOCAB_SIZE


def test_dims_are_checked():
    with pytest.raises(ValueError, match="hidden_size 100 is no even multiple of num_heads 3"):
        tiny_thinker_config(hidden_size=100, num_heads=3)


def test_the_full_model_speaks(processor, clips):
    model = tiny_omni()
    inputs = speech_inputs(prepare_inputs(processor, clips["short"], QUESTION, **SMALL))
    ids, wave = model.generate(**inputs, thinker_max_new_tokens=4, talker_max_new_tokens=6)
    assert ids.shape[1] > inputs["input_ids"].shape[1]
    assert wave.dim() == 1 and wave.numel() > 0 and wave.isfinite().all()


# --- the processor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Hello, wörld: 日本\n", "  two  spaces\t", "<|im_start|>user\nhi<|im_end|>"])
def test_the_tokenizer_gives_back_what_it_got(processor, text):
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_single_tokens_with_the_fixed_ids(processor):
    for name, text in SPECIAL_TOKENS.items():
        assert processor.tokenizer(text)["input_ids"] == [TOKEN_IDS[name]]
    assert len(processor.tokenizer) == VOCAB_SIZE
    assert processor.tokenizer("A")["input_ids"] == [len(SPECIAL_TOKENS) + ord("A")]


def test_the_processor_is_the_same_after_saving_and_loading(processor, clips, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, Qwen2_5OmniProcessor)
    for interleaved in (False, True):
        expected = prepare_inputs(processor, clips["long"], QUESTION, use_audio_in_video=interleaved, **SMALL)
        got = prepare_inputs(loaded, clips["long"], QUESTION, use_audio_in_video=interleaved, **SMALL)
        assert expected.keys() == got.keys()
        assert all(torch.equal(torch.as_tensor(expected[name]), torch.as_tensor(got[name])) for name in expected)


# --- a clip and a question ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("names", [["long"], ["long", "short"]])
def test_placeholders_match_the_features(processor, clips, thinker, names, interleaved):
    chosen = [clips[name] for name in names]
    inputs = prepare_inputs(processor, chosen, QUESTION, use_audio_in_video=interleaved, **SMALL)
    assert inputs["video_grid_thw"][:, 0].tolist() == [(len(clip.frames) + 1) // 2 for clip in chosen]
    assert count(inputs, "video_token") == inputs["video_grid_thw"].prod(-1).sum() // 4 > 0
    # One thing more than the 25 tokens per second is up to the rounding of the halvings.
    assert count(inputs, "audio_token") == audio_tokens(inputs)
    assert abs(audio_tokens(inputs) - 25 * sum(clip.duration_s for clip in chosen)) <= 2 * len(chosen)
    assert inputs["video_second_per_grid"].tolist() == [1.0] * len(chosen)  # two frames at two per second
    assert inputs.get("use_audio_in_video", False) == interleaved
    assert answer(thinker, inputs).shape == (1, 4)


def test_interleaving_puts_the_sound_between_the_frames(processor, clips):
    def runs(inputs):
        """The modalities in the order in which they occur, repeats left out."""
        kinds = {TOKEN_IDS["video_token"]: "v", TOKEN_IDS["audio_token"]: "a"}
        found = [kinds[token] for token in inputs["input_ids"][0].tolist() if token in kinds]
        return "".join(kind for kind, before in zip(found, [None, *found], strict=False) if kind != before)

    assert runs(prepare_inputs(processor, clips["long"], QUESTION, **SMALL)) == "va"
    # Chunks of two seconds.
    assert runs(prepare_inputs(processor, clips["long"], QUESTION, use_audio_in_video=True, **SMALL)) == "vavava"


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name, absent", [("silent", "input_features"), ("blind", "pixel_values_videos")])
def test_a_clip_that_lacks_a_part(processor, clips, thinker, name, absent, interleaved):
    inputs = prepare_inputs(processor, clips[name], QUESTION, use_audio_in_video=interleaved, **SMALL)
    assert absent not in inputs and "use_audio_in_video" not in inputs
    assert (count(inputs, "video_token") == 0) == (name == "blind")
    assert (count(inputs, "audio_token") == 0) == (name == "silent")
    assert answer(thinker, inputs).shape == (1, 4)


def test_a_padded_batch_answers_like_its_samples(processor, clips, thinker):
    conversations = [
        ([clips["long"]], QUESTION),
        ([clips["silent"]], "A longer question about it?"),
        ([], "Hi."),
        ([clips["blind"], clips["short"]], "And these?"),
    ]
    batch = prepare_batch(processor, conversations, **SMALL)
    assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"].all()  # padded left
    together = answer(thinker, batch)
    for row, conversation in zip(together, conversations, strict=True):
        assert torch.equal(row[None], answer(thinker, prepare_inputs(processor, *conversation, **SMALL)))


def test_frame_pixels_decide_the_number_of_tokens(processor, clips):
    default = prepare_inputs(processor, clips["short"], QUESTION)
    fewer = prepare_inputs(processor, clips["short"], QUESTION, frame_pixels=(28 * 28, 9 * 28 * 28))
    grids = (len(clips["short"].frames) + 1) // 2
    assert count(default, "video_token") >= 128 * grids  # the least that Qwen2.5-Omni's processor gives two frames
    assert count(fewer, "video_token") <= 9 * grids


def test_the_last_question_token(processor, clips):
    inputs = prepare_inputs(processor, clips["short"], QUESTION, **SMALL)
    index = last_question_token(processor, QUESTION)
    assert processor.tokenizer.decode(inputs["input_ids"][0, : index + 1]).endswith(QUESTION)


@pytest.mark.parametrize("question", ["", "  \n", None])
def test_an_empty_question(processor, clips, question):
    with pytest.raises(ValueError, match="the question is empty"):
        prepare_inputs(processor, clips["short"], question)


def test_clips_that_do_not_go_together(processor, clips):
    with pytest.raises(ValueError, match="interleaving needs picture and sound in every clip"):
        prepare_inputs(processor, [clips["short"], clips["silent"]], QUESTION, use_audio_in_video=True)
    still = Clip(np.zeros((2, 56, 56, 3), np.uint8), 1.0, None, 16000, 2.0)
    with pytest.raises(ValueError, match=r"one frame rate, got \[1.0, 2.0\]"):
        prepare_inputs(processor, [clips["short"], still], QUESTION)
    slow = Clip(None, 1.0, np.zeros(8000, np.float32), 8000, 1.0)
    with pytest.raises(ValueError, match="load it with sampling_rate=16000"):
        prepare_inputs(processor, slow, QUESTION)
    with pytest.raises(ValueError, match="frame_pixels must be"):
        prepare_inputs(processor, clips["short"], QUESTION, frame_pixels=(100, 10))


def test_sound_beyond_what_the_model_hears_is_reported(processor):
    long = Clip(None, 1.0, np.zeros(31 * 16000, np.float32), 16000, 31.0)
    with pytest.warns(UserWarning, match="hears only the first 30 s of 31.0 s"):
        prepare_inputs(processor, long, QUESTION)


# --- model folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speech", [False, True])
def test_a_saved_model_loads_with_the_same_weights(tmp_path, processor, clips, speech):
    folder = save_random_model(tmp_path / "model", seed=2, speech=speech)
    thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder)
    expected = tiny_omni(2).thinker if speech else tiny_thinker(2)
    assert thinker.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(value, thinker.state_dict()[name]) for name, value in expected.state_dict().items())
    if speech:
        full = Qwen2_5OmniForConditionalGeneration.from_pretrained(folder)
        assert getattr(full.config, RANDOM_MARK) and set(full.speaker_map) == {"Chelsie", "Ethan"}
    else:
        assert getattr(thinker.config, RANDOM_MARK)
        # It picks printable ASCII only.
        text = processor.decode(answer(thinker, prepare_inputs(processor, clips["short"], QUESTION, **SMALL), 12)[0])
        assert text.isascii() and text.replace("<|im_end|>", "").isprintable()

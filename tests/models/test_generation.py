"""Ports whose official code generates from embeddings: settings of generate count the answer only, given ids or not."""

from __future__ import annotations

import zlib

import pytest
import torch
from transformers import GenerationMixin, LogitsProcessor, RepetitionPenaltyLogitsProcessor, WatermarkingConfig

import fmd_ext
from fmd_ext.engine.reference import decoder_inputs
from fmd_ext.lab.tiny.processor import byte_tokenizer
from fmd_ext.models.generation import EmbeddingsGenerationMixin
from fmd_ext.models.videollama2 import VideoLlama2Qwen2Config, VideoLlama2Qwen2ForConditionalGeneration
from ports import PORTS

NAMES = ("videollama2_qwen2", "video_salmonn", "video_salmonn2")


@pytest.fixture(params=NAMES)
def port(request):
    chosen = PORTS[request.param]
    yield chosen
    if fmd_ext.handle_of(chosen.model) is not None:
        fmd_ext.unpatch(chosen.model)


def embedded(port, inputs):
    """The same prompts as embeddings, clips in place."""
    shared = {name: inputs[name] for name in ("attention_mask", "position_ids") if name in inputs}
    return {"inputs_embeds": decoder_inputs(port.model, **inputs)["inputs_embeds"], **shared}


def from_embeds(port, inputs, **options):
    greedy = {"do_sample": False, "eos_token_id": None, **port.options, **options}
    return port.model.generate(**embedded(port, inputs), **greedy)


@pytest.fixture
def transformers_alone(monkeypatch):
    """transformers' own processors and criteria, in the place of the mended ones."""
    for name in ("_get_logits_processor", "_get_stopping_criteria"):
        monkeypatch.setattr(EmbeddingsGenerationMixin, name, getattr(GenerationMixin, name))
    return monkeypatch


# --- the official tokens ----------------------------------------------------------------------------------------------

# fmt: off
PROMPT = [54, 131, 31, 175, 104, 80, 134, 132, 9, 88, 161, 107, 77, 9, 45, 56, 88, 149, 39, 91, 114, 59, 73, 177, 29,
          102, 145, 93]
# By the official Videollama2Qwen2ForCausalLM (branch audio_visual, 8cedfbd) on transformers 4.42.3: text alone, greedy.
OFFICIAL = {
    1.0: [202, 76, 116, 84, 94, 66, 117, 128, 19, 106, 24, 167, 167, 167, 149, 63, 128, 19, 106, 146],
    1.05: [202, 76, 116, 84, 94, 66, 117, 128, 19, 106, 24, 167, 149, 63, 69, 76, 141, 43, 120, 29],
    1.2: [202, 76, 116, 84, 94, 66, 117, 128, 19, 106, 24, 167, 149, 63, 69, 148, 152, 0, 18, 98],
}
# fmt: on


@pytest.fixture(scope="module")
def official():
    """The model of the official tokens."""
    tower = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 3}
    config = VideoLlama2Qwen2Config(
        vocab_size=211,
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        rope_theta=1e6,
        vision_config={**tower, "model_type": "siglip_vision_model", "image_size": 70, "patch_size": 14},
    )
    model = VideoLlama2Qwen2ForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            kind = name.rpartition(".weight")[0].rpartition(".")[2]
            values *= {"embed_tokens": 0.5, "lm_head": 0.3}.get(kind, 0.5 / parameter[0].numel() ** 0.5)
        else:
            values = 1 + 0.3 * values if "norm" in name else 0.2 * values
        parameter.data.copy_(values)
    return model


@pytest.mark.parametrize("penalty", OFFICIAL)
def test_a_repetition_penalty_gives_the_official_tokens(official, penalty):
    """Also one that comes with the checkpoint, in generation_config.json."""
    ids = torch.tensor([PROMPT])
    options = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": None}
    official.generation_config.repetition_penalty = penalty
    assert official.generate(input_ids=ids, **options)[0, len(PROMPT) :].tolist() == OFFICIAL[penalty]
    embeds = official.get_input_embeddings()(ids)
    assert official.generate(inputs_embeds=embeds, **options)[0].tolist() == OFFICIAL[penalty]
    with fmd_ext.patch(official, fork_layers=2, runner=True):
        assert official.generate(input_ids=ids, **options)[0, len(PROMPT) :].tolist() == OFFICIAL[penalty]


# --- all that reads ids -----------------------------------------------------------------------------------------------

# From the prompt's ids and the plain answer's: settings that read what was said, and settings that count it.
READERS = {
    "repetition_penalty": lambda prompt, answer: {"repetition_penalty": 3.0},
    "beams": lambda prompt, answer: {"repetition_penalty": 3.0, "num_beams": 5},
    "no_repeat_ngram_size": lambda prompt, answer: {"no_repeat_ngram_size": 1},
    "bad_words_ids": lambda prompt, answer: {"bad_words_ids": [[prompt[-1], answer[0]]]},
    "sequence_bias": lambda prompt, answer: {"sequence_bias": {(prompt[-1], answer[0]): -100.0}},
    "forced_bos_token_id": lambda prompt, answer: {"forced_bos_token_id": 7},
    "watermarking_config": lambda prompt, answer: {
        "watermarking_config": WatermarkingConfig(greenlist_ratio=0.05, bias=100.0)
    },
}
COUNTERS = {
    "min_new_tokens": lambda prompt, answer: {"min_new_tokens": 3, "eos_token_id": answer[0]},
    "lengths": lambda prompt, answer: {
        "min_length": len(prompt) + 3,
        "max_length": len(prompt) + 5,
        "max_new_tokens": None,
        "eos_token_id": answer[0],
    },
    "forced_eos_token_id": lambda prompt, answer: {"forced_eos_token_id": 9},
    "exponential_decay_length_penalty": lambda prompt, answer: {
        "exponential_decay_length_penalty": (2, 50.0),
        "eos_token_id": 9,
    },
    "begin_suppress_tokens": lambda prompt, answer: {"begin_suppress_tokens": [answer[0]]},
}


def asked_again(port):
    """A prompt that holds a token of its answer, and that answer."""
    inputs = port.batch("one")
    for _ in range(9):
        answer = port.answer(inputs, max_new_tokens=8)[0].tolist()
        if {*answer} & {*inputs["input_ids"][0].tolist()}:
            return inputs, answer
        inputs["input_ids"][0, 0] = answer[0]
    pytest.fail("the answer changes with every prompt")


@pytest.mark.filterwarnings("ignore:Passing `")  # of transformers alone
@pytest.mark.parametrize("name", [*READERS, *COUNTERS])
def test_ids_and_embeddings_give_the_same_answer(port, name, transformers_alone):
    """As transformers gives it from embeddings; from ids it gives another where a setting reads them."""
    inputs, plain = asked_again(port)
    prompt = inputs["input_ids"][0].tolist()
    settings = {"max_new_tokens": 8, **(READERS | COUNTERS)[name](prompt, plain)}
    expected = from_embeds(port, inputs, **settings).tolist()
    unmended = port.answer(inputs, **settings).tolist()
    transformers_alone.undo()
    assert port.answer(inputs, **settings).tolist() == expected
    assert from_embeds(port, inputs, **settings).tolist() == expected
    assert unmended == expected != [plain] if name in COUNTERS else unmended != expected


def test_padding_is_no_part_of_the_answer(port):
    """transformers takes the prompt's padding for the first tokens of an answer from embeddings."""
    settings = {"max_new_tokens": 8, "repetition_penalty": 1.5}
    for batch, answer in (
        (port.batch("mixed"), port.answer),
        (port.batch("mixed"), lambda i, **s: from_embeds(port, i, **s)),
    ):
        together = answer(batch, **settings)
        alone = [answer(sample, **settings)[0].tolist() for sample in port.samples("mixed")]
        assert together.tolist() == alone


def test_the_patched_model_counts_alike(port):
    settings = {"max_new_tokens": 8, "repetition_penalty": 1.5}
    with fmd_ext.patch(port.model, fork_layers=2):
        expected = port.answer(port.batch("mixed"), **settings)
    with fmd_ext.patch(port.model, fork_layers=2, runner=True) as handle:
        assert torch.equal(port.answer(port.batch("mixed"), **settings), expected)
        assert "static steps" in handle.runner.last
    assert not torch.equal(port.answer(port.batch("mixed"), **settings), expected)


class Watch(LogitsProcessor):
    def __init__(self):
        self.lengths = []

    def __call__(self, input_ids, scores):
        self.lengths.append(input_ids.shape[1])
        return scores


def test_what_a_user_hands_over_sees_prompt_and_answer(port, transformers_alone):
    inputs = port.batch("one")
    length = inputs["input_ids"].shape[1]
    watch, seen = Watch(), []
    given = [watch, RepetitionPenaltyLogitsProcessor(1.5)]

    def allowed(batch, ids):
        seen.append(len(ids))
        return list(range(40))

    settings = {"max_new_tokens": 4, "logits_processor": given, "prefix_allowed_tokens_fn": allowed, "top_k": 5}
    expected = port.answer(inputs, **settings)
    transformers_alone.undo()
    assert torch.equal(port.answer(inputs, **settings), expected)
    assert watch.lengths == seen == [*range(length, length + 4)] * 2


def test_guidance_starts_from_the_prompt(port, transformers_alone):
    inputs = port.batch("one")
    expected = port.answer(inputs, max_new_tokens=4, guidance_scale=1.5)
    transformers_alone.undo()
    assert torch.equal(port.answer(inputs, max_new_tokens=4, guidance_scale=1.5), expected)


@pytest.mark.parametrize("setting", [{"encoder_repetition_penalty": 1.5}, {"encoder_no_repeat_ngram_size": 1}])
def test_settings_about_an_encoders_ids_are_ignored_with_a_word(port, setting):
    inputs = port.batch("one")
    plain = port.answer(inputs, max_new_tokens=4)
    with pytest.warns(UserWarning, match=f"{next(iter(setting))} reads a prompt's ids, and this model has embeddings"):
        assert torch.equal(port.answer(inputs, max_new_tokens=4, **setting), plain)


def test_a_stop_string_lies_in_the_answer():
    """The prompt ends with a line break, the answer is made to be "oooo..."."""
    port, tokenizer = PORTS["videollama2_qwen2"], byte_tokenizer()
    inputs = port.batch("one")
    assert tokenizer.decode(inputs["input_ids"][0, -1:]) == "\n"
    (letter,) = tokenizer("o", add_special_tokens=False)["input_ids"]
    settings = {"max_new_tokens": 5, "sequence_bias": {(letter,): 1e4}, "tokenizer": tokenizer}
    lengths = [port.answer(inputs, **settings, stop_strings=[text]).shape[1] for text in ("\no", "ooo", "never")]
    assert lengths == [5, 3, 5]


# --- embeddings as inputs, and the call -------------------------------------------------------------------------------


def test_a_patched_model_answers_from_embeddings_and_labels(port):
    """Token-wise labels and, for channel-wise fusion, the branches' embeddings are handed over."""
    inputs = port.batch("mixed")
    config = fmd_ext.patch(port.model, fork_layers=2).config
    expected = port.answer(inputs, max_new_tokens=4)
    fmd_ext.unpatch(port.model)
    given = decoder_inputs(port.model, mask_scale=config.mask_scale, **inputs)
    plain = from_embeds(port, inputs, max_new_tokens=4)
    call = embedded(port, inputs) | {"modality_labels": given["labels"].clamp(min=0)}
    if "branch_embeds" in given:
        call["branch_embeds"] = given["branch_embeds"]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, **port.options}
    with fmd_ext.patch(port.model, config):
        assert torch.equal(port.model.generate(**call, **options), expected)
    assert not torch.equal(plain, expected)


def test_features_beside_embeddings_are_refused(port):
    inputs = port.batch("one")
    embeds = embedded(port, inputs)
    for name in port.model.features:
        if name in inputs:
            with pytest.raises(ValueError, match=f"inputs_embeds already hold the clip; got {name} beside them"):
                port.model(**embeds, **{name: inputs[name]})
    with pytest.raises(ValueError, match="already hold the clip"):
        port.model.generate(
            **embeds, max_new_tokens=1, **{name: inputs[name] for name in port.model.features if name in inputs}
        )


def test_loss_logits_to_keep_and_tuples(port):
    inputs = port.batch("one")
    ids = inputs["input_ids"]
    out = port.model(**inputs, labels=ids)
    expected = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(out.loss, expected)
    for keep in (3, torch.tensor([2, 5])):
        rows = slice(-3, None) if isinstance(keep, int) else keep
        torch.testing.assert_close(port.model(**inputs, logits_to_keep=keep).logits, out.logits[:, rows])
    as_tuple = port.model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], out.logits)

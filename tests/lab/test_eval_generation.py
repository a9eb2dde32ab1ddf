"""One batch answered: decoding as asked for whatever the model's own settings are, and answers counted to their end."""

from __future__ import annotations

import math
import types

import pytest
import torch

from eval_model import readable
from fmd_ext.lab.baselines.mad import ONE_MODALITY
from fmd_ext.lab.baselines.outro import NO_SINK
from fmd_ext.lab.eval.generation import (
    THINKING_TOKENS,
    Decoding,
    answer,
    checkpoint_settings,
    settings_in_force,
    token_limits,
)
from fmd_ext.lab.eval.methods import parse_methods
from fmd_ext.lab.tiny import tiny_processor, tiny_thinker
from omni_inputs import AUDIO_VIDEO, VIDEO_AUDIO, VIDEO_ONLY, build_inputs
from recomputed import build_questions

(VANILLA,) = parse_methods("vanilla")


@pytest.fixture(scope="module")
def model():
    return readable(tiny_thinker(seed=0))


def said(model, decoding, samples=(VIDEO_AUDIO,), **options):
    inputs = build_inputs(list(samples))
    return answer(model, tiny_processor(), VANILLA, inputs, decoding, **{"max_new_tokens": 6, **options})


def test_the_models_own_settings_for_sampling_have_no_effect(model, monkeypatch):
    own = model.generation_config
    plain, drawn = said(model, Decoding()).texts, said(model, Decoding(temperature=3.0)).texts
    monkeypatch.setattr(own, "do_sample", True)
    monkeypatch.setattr(own, "temperature", 9.0)
    assert said(model, Decoding()).texts == plain
    monkeypatch.setattr(own, "top_k", 1)
    monkeypatch.setattr(own, "top_p", 0.1)
    assert said(model, Decoding(temperature=3.0)).texts == drawn != plain


def test_a_checkpoints_penalty_has_an_effect_only_where_it_is_asked_for(model, monkeypatch):
    plain = said(model, Decoding()).texts
    own = model.generation_config
    monkeypatch.setattr(own, "repetition_penalty", 0.01)  # far below 1: the answer repeats what is there
    assert said(model, Decoding()).texts == plain
    assert said(model, Decoding(generation_config="model")).texts != plain
    assert model.generation_config is own
    assert checkpoint_settings(model) == {"repetition_penalty": 0.01}
    assert "repetition_penalty" not in settings_in_force(model, Decoding())
    assert settings_in_force(model, Decoding(generation_config="model"))["repetition_penalty"] == 0.01
    assert settings_in_force(model, Decoding())["suppress_tokens"] == own.suppress_tokens


def test_scores_that_cannot_be_ranked_are_counted(model, monkeypatch):
    """From the second step on, of the first row."""
    head, calls = model.get_output_embeddings(), iter(range(100))

    def broken(module, inputs, output):
        if next(calls):
            output[0] = math.nan

    handle = head.register_forward_hook(broken)
    try:
        found = said(model, Decoding(), (VIDEO_AUDIO, AUDIO_VIDEO))
    finally:
        handle.remove()
    assert found.non_finite_steps == [found.tokens[0] - 1, 0] and found.tokens[0] > 1
    assert said(model, Decoding()).non_finite_steps == [0]


def test_the_random_state_around_is_left_alone(model):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    said(model, Decoding(temperature=1.0))
    assert torch.equal(torch.rand(1), expected)


def test_tokens_are_counted_up_to_the_end_of_each_answer(model, monkeypatch):
    inputs = build_inputs([VIDEO_AUDIO, AUDIO_VIDEO])
    free = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)[:, -6:]
    end = int(free[0, 2])  # the first answer's third token
    assert end not in free[0, :2] and end not in free[1]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end, 0])
    both = [VIDEO_AUDIO, AUDIO_VIDEO]
    found = said(model, Decoding(), both)
    assert found.tokens == [3, 6] and found.ended == [True, False]
    assert said(model, Decoding(), both[:1], exactly=True).tokens == [6]


def test_the_first_token_is_timed_before_the_last(model):
    times = said(model, Decoding())
    assert 0 < times.first_token_s < times.seconds


def test_a_model_that_thinks_aloud_gets_the_tokens_for_it():
    processor = types.SimpleNamespace(chat_template="{{ message }}", tokenizer=None)
    assert token_limits(processor, {"yes-no": 16}) == {"yes-no": 16}
    processor.chat_template = "{% if thinking %}<think>{% endif %}"
    assert token_limits(processor, {"yes-no": 16}) == {"yes-no": 16 + THINKING_TOKENS}
    alone = types.SimpleNamespace(tokenizer=types.SimpleNamespace(chat_template="<think>"))
    assert token_limits(alone, {"word": 8}) == {"word": 8 + THINKING_TOKENS}
    assert token_limits(tiny_processor(), {"word": 8}) == {"word": 8}


def test_what_a_method_says_of_the_prompts_is_kept(model):
    """A baseline that does not act, or that has changed the prompt, says so per answer; other methods say nothing."""
    processor = tiny_processor()
    inputs = build_questions([VIDEO_AUDIO, VIDEO_ONLY], processor)
    notes = {
        method: answer(model, processor, *parse_methods(method), inputs, Decoding(), max_new_tokens=1).notes
        for method in ("vanilla", "outro", "drop:needs=audio", "mad")
    }
    assert notes == {
        "vanilla": [{}, {}],
        "outro": [{NO_SINK: ""}] * 2,
        "drop:needs=audio": [{"video dropped": ""}, {}],
        "mad": [{}, {ONE_MODALITY: ""}],
    }

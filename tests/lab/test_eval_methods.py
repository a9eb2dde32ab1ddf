"""The table of methods: how entries are written, that they act, and that they leave the model as it was."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import fmd_ext
from fmd_ext.adapters import find_adapter
from fmd_ext.lab.eval.methods import METHODS, Choice, parse_methods
from fmd_ext.lab.tiny import tiny_processor
from omni_inputs import VIDEO_AUDIO
from recomputed import build_questions

PROCESSOR = tiny_processor()


def test_parse_methods():
    vanilla, zero, attention = parse_methods('vanilla,fmd-zero:alpha={"visual":0.9,"audio":1}, fmd-attention')
    assert (vanilla.name, attention.name) == ("vanilla", "fmd-attention")
    assert zero.settings == {"alpha": {"visual": 0.9, "audio": 1}}
    assert parse_methods("fmd:masking=attention:fork_layers=2")[0].settings == {
        "masking": "attention",
        "fork_layers": 2,
    }


@pytest.mark.parametrize("text", ["vanilla", "fmd-zero:fork_layers=2:alpha=0.5", 'fmd:alpha={"visual":1,"audio":0}'])
def test_a_name_reads_back_as_the_same_choice(text):
    (choice,) = parse_methods(text)
    assert parse_methods(choice.name) == [choice]


def test_defaults_do_not_replace_what_is_chosen():
    vanilla, fmd = parse_methods("vanilla,fmd:alpha=0.5")
    more = {"alpha": 0.9, "fork_layers": 3}
    assert vanilla.with_defaults(more).settings == {}
    assert fmd.with_defaults(more).settings == {"alpha": 0.5, "fork_layers": 3}


@pytest.mark.parametrize(
    "text, message",
    [
        ("vanila", "unknown method 'vanila'; the methods are vanilla, fmd"),
        ("fmd:depth=3", "method fmd has no setting 'depth'; its settings are: fork_layers"),
        ("vanilla:alpha=1", "method vanilla has no setting 'alpha'; its settings are: none"),
        ("vanilla,vanilla", "named twice"),
        ("", "unknown method ''"),
    ],
)
def test_wrong_choices_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_methods(text)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_no_trace(thinker, name):
    """After the method, and after an error within it, the model generates what it generated before."""
    inputs = build_questions([VIDEO_AUDIO], PROCESSOR)
    before = thinker.generate(**inputs, max_new_tokens=4, do_sample=False)
    choice = Choice(METHODS[name], {})
    with choice.applied(thinker, PROCESSOR) as settings:
        assert thinker.generate(**inputs, max_new_tokens=4, do_sample=False).shape[0] == 1
    assert isinstance(settings, dict) and "processor" not in settings
    json.dumps(settings)
    with pytest.raises(RuntimeError, match="stop"), choice.applied(thinker, PROCESSOR):
        raise RuntimeError("stop")
    assert torch.equal(thinker.generate(**inputs, max_new_tokens=4, do_sample=False), before)
    assert fmd_ext.handle_of(thinker) is None


def test_settings_in_force_are_given(thinker):
    (zero, attention) = parse_methods("fmd-zero:fork_layers=2,fmd-attention")
    with zero.applied(thinker) as settings:
        assert (settings["fork_layers"], settings["masking"], settings["alpha"]) == (2, "zero", 0.8)
        assert fmd_ext.handle_of(thinker).config.fork_layers == 2
    with attention.applied(thinker) as settings:
        assert settings["masking"] == "attention"


def test_every_setting_of_the_config_can_be_chosen():
    assert set(METHODS["fmd"].settings) == {field.name for field in dataclasses.fields(fmd_ext.FMDConfig)}


def test_vanilla_refuses_a_patched_model(thinker):
    with fmd_ext.patch(thinker), pytest.raises(ValueError, match="patched already"):
        with Choice(METHODS["vanilla"], {}).applied(thinker):
            pass


# Settings under which the declared passes are those of every step.
ALWAYS = {"avcd": {"min_entropy": 0.0}, "drop": {"needs": "audio"}}


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("fmd")])
def test_the_passes_that_a_method_declares_are_those_that_it_makes(thinker, name):
    """Of the methods that call the model's own forward: fork-merge decoding may decode by a step of its own."""
    inputs = build_questions([VIDEO_AUDIO], PROCESSOR)
    method = METHODS[name]
    calls = []
    decoder = find_adapter(thinker).find_decoder(thinker)
    with Choice(method, ALWAYS.get(name, {})).applied(thinker, PROCESSOR):
        with decoder.register_forward_pre_hook(lambda *_: calls.append(1)):
            thinker.generate(**inputs, max_new_tokens=1, do_sample=False, eos_token_id=None)
            prompt = len(calls)
            calls.clear()
            thinker.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert (prompt, len(calls) - prompt) == (method.passes.prompt, 3 * method.passes.token)


def test_passes_in_words():
    assert str(METHODS["vanilla"].passes) == "1 prefill, 1 pass per token"
    assert str(METHODS["mad"].passes) == "5 prefills, 4 passes per token (one prefill asks)"


@pytest.mark.parametrize("name", ["mad", "drop"])
def test_a_method_that_reads_prompts_says_that_it_needs_the_processor(thinker, name):
    with pytest.raises(ValueError, match=f"method {name} reads prompts: it needs the model's processor"):
        Choice(METHODS[name], {}).applied(thinker)


def test_routing_is_a_method_and_a_setting(thinker):
    """Both read prompts, so both are handed the processor."""
    routed, asked = parse_methods('fmd-routed:fork_layers=2,fmd-zero:text_weight={"visual":0.8,"audio":0.2}')
    router = fmd_ext.Router(tiny_processor())
    with routed.applied(thinker, router) as settings:
        assert settings["masking"] == "attention" and settings["text_weight"] == "auto" and settings["fork_layers"] == 2
    with asked.applied(thinker, router) as settings:
        assert settings["masking"] == "zero" and settings["text_weight"] == {"visual": 0.8, "audio": 0.2}
    for choice in (routed, asked):
        with pytest.raises(ValueError, match="needs the model's processor"):
            choice.applied(thinker)
    assert "text only" in str(METHODS["fmd-routed"].passes)

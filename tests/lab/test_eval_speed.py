"""Speed: what is timed and what is not, with answers whose times are made up."""

from __future__ import annotations

import types

import pytest
import torch

from fmd_ext.lab.eval import generation, speed
from fmd_ext.lab.eval.clips import Group
from fmd_ext.lab.eval.generation import Decoding, Said


def clips(inputs, error=None):
    return types.SimpleNamespace(prepare=lambda items: [Group(items, inputs, error)])


@pytest.fixture
def runner():
    choices = [types.SimpleNamespace(name=name) for name in ("vanilla", "fmd")]
    model = types.SimpleNamespace(device=torch.device("cpu"))
    inputs = {"input_ids": torch.zeros(1, 7, dtype=torch.long)}
    return types.SimpleNamespace(choices=choices, model=model, processor=None, decoding=Decoding(), clips=clips(inputs))


def test_the_first_answer_of_each_method_is_not_timed(runner, monkeypatch):
    """It is where libraries set themselves up. Ratios are of the same item."""
    asked = []

    def answer(model, processor, choice, inputs, decoding, *, max_new_tokens, exactly, random_key):
        assert exactly and max_new_tokens == 5
        asked.append((choice.name, *random_key))
        first = (
            100.0 if asked.count(asked[-1]) == 1 and random_key == ("a",) else {"vanilla": 1.0, "fmd": 1.5}[choice.name]
        )
        return Said(["x"], [5], [False], [0], first, first + {"vanilla": 2.0, "fmd": 4.0}[choice.name])

    monkeypatch.setattr(generation, "answer", answer)
    items = [types.SimpleNamespace(id=name) for name in "abc"]
    found = speed.measure(runner, items, tokens=5)
    assert asked[:4] == [("vanilla", "a"), ("vanilla", "a"), ("fmd", "a"), ("fmd", "a")] and len(asked) == 8
    assert (found["items"], found["tokens"], found["prompt_tokens"]) == (3, 5, 7.0)
    assert found["methods"]["vanilla"]["first_token_s"] == 1.0 and found["methods"]["vanilla"]["tokens_per_s"] == 2.0
    assert found["methods"]["fmd"]["first_token_ratio"] == [1.5] * 3
    assert found["methods"]["fmd"]["tokens_per_s_ratio"] == [0.5] * 3
    assert found["methods"]["fmd"]["peak_bytes"] is None


def test_what_cannot_be_timed_is_named(runner):
    runner.clips = clips(None, "the video is missing")
    with pytest.raises(ValueError, match="a cannot be asked: the video is missing"):
        speed.measure(runner, [types.SimpleNamespace(id="a")])
    with pytest.raises(ValueError, match="tokens must be 2 or more"):
        speed.measure(runner, [], tokens=1)

"""`generate` makes the logits that it reads; a forward call, those of all positions."""

from __future__ import annotations

import pytest
import torch

import fmd_ext
from fmd_ext.lab.tiny import tiny_thinker
from fmd_ext.lab.tiny.qwen3_omni import tiny_qwen3_thinker
from fmd_ext.patching.fusions import kept_logits
from fmd_ext.patching.routing import answers_to
from omni_inputs import QWEN3, TEXT_ONLY, VIDEO_AUDIO, build_inputs
from ports import PORTS
from traces import snapshot

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
ALL = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}


def thinkers():
    clips = [VIDEO_AUDIO, TEXT_ONLY]
    yield tiny_thinker(), build_inputs(clips)
    yield tiny_qwen3_thinker(), build_inputs(clips, family=QWEN3)


def rows_of_head(model):
    seen = []
    hook = model.register_forward_hook(lambda module, args, out: seen.append(out.logits.shape[1]))
    return seen, hook


@pytest.mark.parametrize("runner", [False, True])
@pytest.mark.parametrize("number", [0, 1], ids=["qwen2_5_omni", "qwen3_omni"])
def test_generate_makes_one_row_and_says_the_same(number, runner):
    model, inputs = list(thinkers())[number]
    traces, length = snapshot(model), inputs["input_ids"].shape[1]
    with fmd_ext.patch(model, fork_layers=2, runner=runner, fusions=False) as handle:
        assert handle.fusions["kept_logits"].places == 0
        expected = model.generate(**inputs, **ALL)
    handle = fmd_ext.patch(model, fork_layers=2, runner=runner)
    assert handle.fusions["kept_logits"].places == 1
    seen, hook = rows_of_head(model)
    out = model.generate(**inputs, **ALL)
    hook.remove()
    assert set(seen) == {1}
    assert torch.equal(out.sequences, expected.sequences)
    for own, other in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(own, other, atol=2e-5, rtol=0)
    assert model(**inputs).logits.shape[1] == length
    assert model(**inputs, logits_to_keep=3).logits.shape[1] == 3
    whole = model(**inputs).logits
    indices = torch.tensor([1, length - 1])
    torch.testing.assert_close(model(**inputs, logits_to_keep=indices).logits, whole[:, indices], atol=2e-5, rtol=0)
    handle.unpatch()
    after = snapshot(model)
    assert traces.keys() == after.keys() and not model._supports_logits_to_keep()
    assert [key for key in traces if traces[key] is not after[key] and traces[key] != after[key]] == []


@pytest.mark.parametrize(
    "more",
    [{"prompt_lookup_num_tokens": 2}, {"num_beams": 2}],
    ids=lambda more: next(iter(more)),
)
def test_other_ways_to_generate_say_the_same(more):
    model, inputs = tiny_thinker(), build_inputs([VIDEO_AUDIO])
    options = {**GREEDY, **more, "max_new_tokens": 9}
    with fmd_ext.patch(model, fork_layers=2, fusions=False):
        expected = model.generate(**inputs, **options)
    with fmd_ext.patch(model, fork_layers=2):
        assert torch.equal(model.generate(**inputs, **options), expected)


def test_a_question_asked_within_a_call_is_not_cut():
    """`text_weight="auto"` gives the output layer rows of its own [questions, hidden]."""

    class Words:
        answers = [[30, 31], [40], [50]]

    model = tiny_thinker()
    prompts = [[30, 40, 50], [33, 44]]
    with fmd_ext.patch(model, fork_layers=2) as handle:
        expected = answers_to(Words, model, handle.decoder, prompts)
        with handle._kept.of({"logits_to_keep": 1}):
            assert (answers_to(Words, model, handle.decoder, prompts) == expected).all()


def test_where_it_is_left_off():
    with fmd_ext.patch(PORTS["videollama2_qwen2"].make(), fork_layers=1) as handle:
        assert str(handle.fusions["kept_logits"]) == "off: the model's forward does it"
    model = tiny_thinker()
    model.lm_head.register_forward_hook(lambda *args: None)
    with fmd_ext.patch(model, fork_layers=1) as handle:
        assert "the output layer has hooks" in str(handle.fusions["kept_logits"])
    assert kept_logits.KeptLogits().is_on is False

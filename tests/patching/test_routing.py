"""text_weight="auto": questions are read off prompts, the model is asked, and what it says is what is computed.

The models have random weights: what they answer is arbitrary, and what is done with it must be exact.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import fmd_ext
from fmd_ext import FMDConfig, ModalityQuestion, Router, Routes
from fmd_ext.adapters import find_adapter
from fmd_ext.engine.reference import decoder_inputs, reference_generate, reference_logits
from fmd_ext.inputs.chat import prepare_batch, prepare_inputs
from fmd_ext.lab.tiny import TOKEN_IDS, tiny_processor, tiny_thinker, video_salmonn2_plus, videollama2
from fmd_ext.lab.tiny.processor import tiny_qwen3_processor
from fmd_ext.lab.tiny.qwen3_omni import tiny_qwen3_thinker
from fmd_ext.models.video_salmonn2 import VideoSalmonn2Processor
from omni_inputs import AUDIO_VIDEO, TEXT_ONLY, TWO_CLIPS, VIDEO_AUDIO, VIDEO_ONLY, build_inputs
from ports import PORTS, clip
from video_salmonn2_recorded import tokenizer as salmonn2_tokenizer

NUM_LAYERS = 4
BATCH = [VIDEO_AUDIO, TEXT_ONLY, TWO_CLIPS, VIDEO_ONLY, AUDIO_VIDEO]
ROUTES = np.array([[0.9, 0.06, 0.04], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1], [1, 0, 0], [0.2, 0.1, 0.7]], np.float32)
SETTINGS = [
    {"masking": "attention", "fork_layers": 2},
    {"masking": "attention", "fork_layers": NUM_LAYERS},
    {"masking": "zero", "fork_layers": 2, "alpha": 0.7},
    {"masking": "zero", "fork_layers": 1, "mask_scale": 0.4, "alpha": {"visual": 0.9, "audio": 0.6}},
]
WORDS_ONLY = {"suppress_tokens": list(TOKEN_IDS.values())}


@pytest.fixture(scope="module")
def _thinker():
    return tiny_thinker(seed=4, num_layers=NUM_LAYERS)


@pytest.fixture
def model(_thinker):
    yield _thinker
    if fmd_ext.handle_of(_thinker) is not None:
        fmd_ext.unpatch(_thinker)


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def configs(routes, **settings):
    """The reference's settings of each sample."""
    base = FMDConfig(**settings).resolve(FMDConfig(), NUM_LAYERS)
    return [
        base.replace(text_weight=visual + both / 2) if max(visual, audio) > both else base.replace(fork_layers=0)
        for visual, audio, both in routes.tolist()
    ]


def routed(processor, routes):
    """A router that gives these routes to the batch's questions in turn, whatever they are."""
    known = {}

    def route(questions):
        for question in questions:
            known.setdefault(question, routes[len(known)])
        return [known[question] for question in questions]

    return Router(processor, route=route)


# --- what is computed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_logits_are_the_references_with_each_samples_weight(model, settings, padding):
    """A sample that needs both is computed as by the unpatched model; one without a second sense needs no route."""
    inputs = build_inputs(BATCH, padding=padding)
    expected = reference_logits(model, configs(ROUTES, **settings), **inputs)
    plain = model(**inputs).logits
    there = inputs["attention_mask"].bool()
    with fmd_ext.patch(model, **settings) as handle, handle.routed(Routes(ROUTES)):
        got = model(**inputs).logits
        torch.testing.assert_close(got[there], expected[there], atol=1e-4, rtol=1e-4)
        forks = handle.last_call.plan.forked
    assert forks.tolist() == [True, False, True, False, False]
    for sample, forked in enumerate(forks):
        moved = (got[sample] - plain[sample])[there[sample]].abs().max()
        assert (moved > 0.01) == forked, (sample, moved)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("runner", [False, True])
def test_answers_are_the_references(model, processor, settings, runner):
    """The questions are read off the prompts; the weights hold for the whole answer, cached."""
    inputs = build_inputs(BATCH)
    asked = [0, 2, 3, 4]  # the text-only sample is not asked about
    expected = reference_generate(model, configs(ROUTES, **settings), max_new_tokens=6, **inputs)
    router = routed(processor, ROUTES[asked])
    with fmd_ext.patch(model, text_weight="auto", processor=router, runner=runner, **settings) as handle:
        got = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(got[:, inputs["input_ids"].shape[1] :], expected)
        np.testing.assert_array_equal(handle.last_routes.probabilities[asked], ROUTES[asked])
        assert handle.last_routes.questions[1] is None and handle.last_routes.forks.tolist()[1] is False
        again = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(again, got)


def test_each_need_may_have_a_weight_of_its_own(model, processor):
    """The mean over what the question may need; the settings stand in files and come back."""
    weights = {"visual": 0.8, "audio": 0.3}
    inputs, router = build_inputs([VIDEO_AUDIO]), routed(processor, ROUTES[[2]])
    expected = 0.1 * 0.8 + 0.8 * 0.3 + 0.1 * 0.5
    config = FMDConfig(fork_layers=2, text_weight=expected).resolve(FMDConfig(), NUM_LAYERS)
    reference = reference_logits(model, config, **inputs)
    with fmd_ext.patch(model, text_weight=weights, fork_layers=2, processor=router) as handle:
        torch.testing.assert_close(model(**inputs).logits, reference, atol=1e-4, rtol=1e-4)
        assert handle.last_call.home_weights[0, 0].item() == pytest.approx(expected)
        assert handle.last_routes.settings(handle.config)[0].text_weight == pytest.approx(expected)
    assert FMDConfig(text_weight=weights).asks and FMDConfig(text_weight="auto").asks
    assert not FMDConfig(text_weight=0.3).asks and not FMDConfig().asks
    with pytest.raises(ValueError, match="text_weight must have exactly the keys"):
        FMDConfig(text_weight={"visual": 1.0})
    with pytest.raises(ValueError, match=r"text_weight\['audio'\] must be in \[0, 1\]"):
        FMDConfig(text_weight={"visual": 1.0, "audio": 2.0})


def test_the_runner_keeps_no_weights_of_an_earlier_call(model):
    """The same kept step serves calls with other routes."""
    inputs = build_inputs([VIDEO_AUDIO])
    call = {**inputs, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **WORDS_ONLY}
    settings = {"masking": "attention", "fork_layers": NUM_LAYERS}
    found = {}
    for runner in (False, True):
        with fmd_ext.patch(model, runner=runner, **settings) as handle:
            for need in ("visual", "audio", "visual"):
                with handle.routed(Routes.needing([need])):
                    out = model.generate(**call)
                assert torch.equal(out, found.setdefault(need, out))
    assert not torch.equal(found["visual"], found["audio"])


def test_beams_and_several_answers_take_their_samples_route(model):
    inputs = build_inputs([VIDEO_AUDIO, TWO_CLIPS])
    call = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "num_beams": 3, "num_return_sequences": 2}
    with fmd_ext.patch(model, masking="attention", fork_layers=2) as handle:
        found = {}
        for needs in (["audio", "visual"], ["audio", "audio"], ["visual", "visual"]):
            with handle.routed(Routes.needing(needs)):
                found[needs[0] + needs[1]] = model.generate(**inputs, **call, **WORDS_ONLY)
    assert torch.equal(found["audiovisual"][:2], found["audioaudio"][:2])
    assert torch.equal(found["audiovisual"][2:], found["visualvisual"][2:])
    assert not torch.equal(found["audioaudio"], found["visualvisual"])


def test_alpha_auto_keeps_the_routes_weight(model):
    inputs = build_inputs([VIDEO_AUDIO, TWO_CLIPS])
    with fmd_ext.patch(model, fork_layers=2, alpha="auto") as handle, handle.routed(Routes(ROUTES[[0, 2]])):
        cache = model(**inputs).past_key_values
        weights = handle.last_call.home_weights
        chosen = [weights[s, 1:3].tolist() for s in (0, 1)]
        model(input_ids=torch.full((2, 1), 50), past_key_values=cache)
        assert torch.equal(handle.last_call.home_weights, weights)
    assert weights[:, 0].tolist() == pytest.approx([0.92, 0.15], abs=1e-6)
    own = [
        config.replace(alpha=dict(zip(("visual", "audio"), alpha, strict=True)))
        for config, alpha in zip(configs(ROUTES[[0, 2]], fork_layers=2), chosen, strict=True)
    ]
    expected = reference_logits(model, own, **inputs)
    with fmd_ext.patch(model, fork_layers=2, alpha="auto") as handle, handle.routed(Routes(ROUTES[[0, 2]])):
        torch.testing.assert_close(model(**inputs).logits[:, -1], expected[:, -1], atol=1e-4, rtol=1e-4)


def test_a_prompt_in_chunks_has_the_route_of_the_whole(model):
    """Also of a sample that needs both, whose second sense comes in a later chunk."""
    given = decoder_inputs(model, **build_inputs([VIDEO_AUDIO, AUDIO_VIDEO]))
    decoder, length = find_adapter(model).find_decoder(model), given["labels"].shape[1]
    with fmd_ext.patch(model, masking="attention", fork_layers=2) as handle:
        with handle.routed(Routes(ROUTES[[2, 4]])), handle.labels(given["labels"]):
            outputs = []
            for size in (length, 7):
                cache, parts = DynamicCache(), []
                for start in range(0, length, size):
                    part = slice(start, start + size)
                    out = decoder(
                        inputs_embeds=given["inputs_embeds"][:, part],
                        position_ids=given["position_ids"][..., part],
                        past_key_values=cache,
                    )
                    parts.append(out.last_hidden_state)
                outputs.append(torch.cat(parts, 1)[given["labels"] >= 0])
                assert handle.last_call.plan.forked.tolist() == [True, False]
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


def test_a_later_turn_has_its_own_weight_and_stays_as_it_forked(model, processor):
    """Its question is read off the ids of the turn; what was cached stays."""
    inputs = build_inputs([VIDEO_AUDIO])
    router = routed(processor, np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]], np.float32))
    settings = {"masking": "attention", "fork_layers": 2}
    with fmd_ext.patch(model, text_weight="auto", processor=router, **settings) as handle:
        ids, cache, weights = inputs.pop("input_ids"), None, []
        inputs.pop("attention_mask")
        for _ in range(3):
            given = {**inputs, "input_ids": ids} if cache is None else {"input_ids": ids, "past_key_values": cache}
            out = model.generate(
                **given,
                max_new_tokens=2,
                do_sample=False,
                eos_token_id=None,
                return_dict_in_generate=True,
                **WORDS_ONLY,
            )
            cache = out.past_key_values
            weights.append(handle.last_call.home_weights[0, 0].item())
            assert handle.last_call.plan.forked.tolist() == [True]
            turn = torch.tensor([[60, 61, 62, 70 + len(weights)]])
            ids = torch.cat([out.sequences, turn], 1)
    assert weights == [0.0, 1.0, 0.5]


# --- what is asked ----------------------------------------------------------------------------------------------------


def asked_probabilities(model, processor, question, words=("video", "audio", "both")):
    """By the model's own forward: first bytes of the answers, with and without a space, upper and lower case."""
    text = fmd_ext.patching.modality_question.MODALITY_QUESTIONS["en"].about(question)
    logits = model(**prepare_inputs(processor, [], text)).logits[0, -1].softmax(-1)
    first = [[processor.tokenizer(w)["input_ids"][0] for w in (word, word.capitalize())] for word in words]
    mass = np.array([logits[tokens].sum().item() for tokens in first])
    return mass / mass.sum()


def test_the_model_is_asked_text_only_as_a_user_would_ask(model, processor):
    questions = ["Is it loud?", "What colour is the disc, and is it round?"]
    conversations = [([clip(seed)], question) for seed, question in enumerate(questions)]
    inputs = prepare_batch(processor, conversations)
    expected = [asked_probabilities(model, processor, question) for question in questions]
    calls = []
    decoder = find_adapter(model).find_decoder(model)
    hook = decoder.register_forward_hook(lambda module, args, out: calls.append(out))
    with fmd_ext.patch(model, text_weight="auto", processor=processor, fork_layers=2) as handle:
        model(**inputs)
        assert handle.last_routes.questions == tuple(questions)
        np.testing.assert_allclose(handle.last_routes.probabilities, expected, atol=1e-5)
        assert handle.last_call.plan.length == inputs["input_ids"].shape[1]  # not that of the asking
        assert len(calls) == 2
        model(**inputs)  # asked once
        assert len(calls) == 3
        assert handle.routes(questions[:1]).questions == (questions[0],) and len(calls) == 3
    hook.remove()


def test_asking_leaves_the_models_positions_alone(model, processor):
    """M-RoPE keeps a prompt's offset on the model; later steps go on from it."""
    inputs, token = prepare_inputs(processor, [clip(0)], "Is it loud?"), torch.tensor([[50]])
    with fmd_ext.patch(model, text_weight="auto", processor=processor, fork_layers=2) as handle:
        cache, routes = model(**inputs).past_key_values, handle.last_routes
        handle.routes(["Is it something else?"])
        step = model(input_ids=token, past_key_values=cache).logits
        ids = torch.cat([inputs["input_ids"], token], 1)
        mask = torch.ones_like(ids)
        with handle.routed(routes):
            whole = model(**{**inputs, "input_ids": ids, "attention_mask": mask}).logits
    torch.testing.assert_close(step[:, -1], whole[:, -1], atol=1e-4, rtol=1e-4)


def test_labels_by_hand_do_not_reach_the_asking(model, processor):
    inputs = build_inputs([VIDEO_AUDIO])
    labels = find_adapter(model).labels_of(model, inputs["input_ids"])
    with fmd_ext.patch(model, text_weight="auto", processor=processor, fork_layers=2) as handle:
        expected = model(**inputs).logits
        routes = handle.last_routes
    with fmd_ext.patch(model, text_weight="auto", processor=processor, fork_layers=2) as handle:
        with handle.labels(labels):
            torch.testing.assert_close(model(**inputs).logits, expected)
        np.testing.assert_array_equal(handle.last_routes.probabilities, routes.probabilities)


def test_prompts_of_one_context_have_their_own_questions(model, processor):
    """The labels of a context serve several calls; what the first one's question needs is not the second one's."""
    inputs = build_inputs([VIDEO_AUDIO])
    labels = find_adapter(model).labels_of(model, inputs["input_ids"])
    other = inputs["input_ids"].clone()
    other[0, -1] = 77
    with fmd_ext.patch(model, text_weight="auto", processor=processor, fork_layers=2) as handle:
        expected = model(**{**inputs, "input_ids": other}).logits
        routes = handle.last_routes
        with handle.labels(labels):
            model(**inputs)
            assert handle.last_routes.questions != routes.questions
            torch.testing.assert_close(model(**{**inputs, "input_ids": other}).logits, expected)
            assert handle.last_routes.questions == routes.questions


def test_last_routes_are_those_of_the_last_prompt(model, processor):
    """Not those of a prompt before it, nor of a question that was asked about by hand; steps leave them."""
    inputs = build_inputs([VIDEO_AUDIO])
    with fmd_ext.patch(model, text_weight="auto", processor=processor, fork_layers=2) as handle:
        cache = model(**inputs).past_key_values
        routes = handle.last_routes
        handle.routes(["Is it loud?"])
        model(input_ids=torch.tensor([[50]]), past_key_values=cache)
        assert handle.last_routes is routes
        model(input_ids=torch.full((1, 5), 50))
        assert handle.last_routes is None
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert handle.last_routes.questions == routes.questions
        model.generate(torch.full((1, 5), 50), max_new_tokens=2, do_sample=False)
        assert handle.last_routes is None


def test_a_prompt_without_ids_is_told_once(model, processor, caplog):
    inputs = build_inputs([VIDEO_AUDIO])
    labels = find_adapter(model).labels_of(model, inputs["input_ids"])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with fmd_ext.patch(model, text_weight="auto", processor=processor, fork_layers=2) as handle:
        for _ in range(2):
            model(inputs_embeds=embeds, modality_labels=labels)
        assert handle.last_routes is None and handle.last_call.plan.forked.all()
        assert handle.last_call.home_weights is None
    assert [record.getMessage().count("no token ids") for record in caplog.records] == [1]


# --- questions in prompts ---------------------------------------------------------------------------------------------


def salmonn2(model):
    return VideoSalmonn2Processor.from_config(model.config, salmonn2_tokenizer())


FAMILIES = {
    "qwen2_5_omni": (tiny_thinker, lambda model: tiny_processor()),
    "qwen3_omni": (tiny_qwen3_thinker, lambda model: tiny_qwen3_processor()),
    "videollama2_qwen2": ("videollama2_qwen2", lambda model: videollama2.processor_for(model.config)),
    "videollama2_mistral": ("videollama2_mistral", lambda model: videollama2.processor_for(model.config)),
    "video_salmonn2": ("video_salmonn2", salmonn2),
    "video_salmonn2_plus": (
        "video_salmonn2_plus_inference",
        lambda model: video_salmonn2_plus.processor_for(model.config),
    ),
}


def family(name):
    make, of = FAMILIES[name]
    model = PORTS[make].model if isinstance(make, str) else make(seed=0)
    return model, of(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_question_is_read_off_every_familys_prompt(name):
    model, processor = family(name)
    router = Router(processor)
    for question in ("Is it loud?", "Which?\nA. A bell\nB. <nothing> at all\nAnswer with the letter."):
        inputs = prepare_inputs(processor, [clip(0, size=(56, 56))], question)
        labels = find_adapter(model).labels_of(model, inputs["input_ids"], inputs)
        assert (labels > 0).any()
        assert router.question_of(inputs["input_ids"][0], labels[0]) == question
    alone = prepare_inputs(processor, [], router.wording.about(question))["input_ids"][0].tolist()
    assert router.prompt_ids(question) == alone


def test_of_several_turns_the_last_one_is_read():
    model, processor = family("qwen2_5_omni")
    router = Router(processor)
    talk = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Is it red?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": [{"type": "text", "text": "Is it loud?"}]},
    ]
    ids = processor.tokenizer(processor.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))[
        "input_ids"
    ]
    labels = [1 if token == TOKEN_IDS["video_token"] else 0 for token in ids]
    assert router.question_of(ids, labels) == "Is it loud?"
    before = [{"role": "user", "content": [{"type": "text", "text": "Is it red?"}, {"type": "video"}]}]
    ids = processor.tokenizer(processor.apply_chat_template(before, tokenize=False, add_generation_prompt=True))[
        "input_ids"
    ]
    labels = [1 if token == TOKEN_IDS["video_token"] else 0 for token in ids]
    assert router.question_of(ids, labels) == "Is it red?"


# --- refusals and traces ----------------------------------------------------------------------------------------------


def test_what_is_refused(model, processor):
    with pytest.raises(TypeError, match="by the model's processor"):
        fmd_ext.patch(model, text_weight="auto")
    with pytest.raises(TypeError, match="text_weight must be a number in \\[0, 1\\] or 'auto'"):
        fmd_ext.patch(model, text_weight="often")
    with pytest.raises(TypeError, match="chat template"):
        Router(object())
    with pytest.raises(ValueError, match="wording must be one of en, zh"):
        Router(processor, "xx")
    with pytest.raises(ValueError, match="must hold {question}"):
        ModalityQuestion("which?", {})
    with pytest.raises(ValueError, match="begin with different tokens"):
        Router(processor, ModalityQuestion("{question}", {"visual": ("a",), "audio": ("ab",), "both": ("b",)}))
    with pytest.raises(ValueError, match="probabilities of visual, audio, both"):
        Routes([[0.5, 0.1, 0.1]])
    with pytest.raises(ValueError, match="routes must be \\[batch, 3\\]"):
        Routes([0.5, 0.5])
    with pytest.raises(ValueError, match="one of visual, audio, both; got 'smell'"):
        Routes.needing(["smell"])
    assert fmd_ext.handle_of(model) is None
    with fmd_ext.patch(model, fork_layers=2) as handle, pytest.raises(ValueError, match="text_weight='auto'"):
        handle.routes(["Is it loud?"])
    with fmd_ext.patch(model, fork_layers=2) as handle, handle.routed(Routes.needing(["audio"] * 2)):
        with pytest.raises(ValueError, match="routes for 2 samples, the call has 1"):
            model(**build_inputs([VIDEO_AUDIO]))


def test_settings_of_each_sample():
    config = FMDConfig(fork_layers=2).resolve(FMDConfig(), NUM_LAYERS)
    found, expected = Routes(ROUTES).settings(config), configs(ROUTES, fork_layers=2)
    assert [own.fork_layers for own in found] == [2, 0, 2, 2, 0] == [own.fork_layers for own in expected]
    assert [own.text_weight for own in found] == pytest.approx([0.92, 0.5, 0.15, 1.0, 0.5])


def test_with_nothing_forked_nothing_is_asked(model):
    inputs = build_inputs([VIDEO_AUDIO])
    expected = model(**inputs).logits
    with fmd_ext.patch(model, text_weight="auto", fork_layers=0) as handle:
        assert torch.equal(model(**inputs).logits, expected) and handle.last_routes is None


def test_patching_again_and_copies(model, processor):
    inputs = build_inputs([VIDEO_AUDIO])
    settings = {"text_weight": "auto", "masking": "attention", "fork_layers": 2}
    with fmd_ext.patch(model, processor=processor, **settings) as handle:
        assert fmd_ext.patch(model, processor=processor, **settings) is handle
        with pytest.raises(ValueError, match="patched already"):
            fmd_ext.patch(model, processor=Router(processor, route=lambda questions: []), **settings)
        expected = model(**inputs).logits
        copied = copy.deepcopy(model)
        torch.testing.assert_close(copied(**inputs).logits, expected)
        assert fmd_ext.handle_of(copied)._asking.session is fmd_ext.handle_of(copied).session
        assert fmd_ext.handle_of(copied).router is handle.router
        handle._claims -= 1

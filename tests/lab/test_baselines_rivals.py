"""MAD, OutRo and the control that drops a modality, cached and in batches, against full recomputes of one sample."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional

from fmd_ext.adapters import find_adapter
from fmd_ext.engine.reference import decoder_inputs
from fmd_ext.engine.routes import NEEDS
from fmd_ext.inputs.chat import prepare_batch
from fmd_ext.lab.baselines import drop, mad, method_of, outro
from fmd_ext.lab.baselines.mad import ONE_MODALITY, PUBLISHED
from fmd_ext.lab.baselines.outro import NO_SINK
from fmd_ext.lab.baselines.prompts import closing_ids
from fmd_ext.lab.tiny import tiny_processor
from fmd_ext.patching.modality_question import MODALITY_QUESTIONS, ModalityQuestion
from fmd_ext.patching.routing import Router, answers_to
from omni_inputs import AUDIO_VIDEO, INTERLEAVED, TEXT_ONLY, TWO_CLIPS, VIDEO_AUDIO, VIDEO_ONLY, build_inputs
from ports import clip
from recomputed import BATCHES, Oracle, build_questions, check, lacking, softmax

GAMMA = 2.5
HAS_BOTH = {"one": [True], "interleaved": [True], "mixed": [True, False, True, False]}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def short_processor():
    return tiny_processor(audio_seconds=2)


def oracle_of(model, inputs):
    return Oracle(model, decoder_inputs(model, **inputs), 0)


# --- MAD --------------------------------------------------------------------------------------------------------------


def asked(inputs, batch, index, processor, wording):
    """The prompt of a sample with the asking text behind its question."""
    own = lacking(inputs, batch, index, ())
    question = processor.tokenizer(wording.text.removeprefix("{question}"))["input_ids"]
    end = len(closing_ids(processor))
    ids = own["input_ids"][0].tolist()
    ids = torch.tensor([ids[:-end] + question + ids[-end:]])
    return {**own, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def mad_oracle(model, inputs, batch, index, tokens, processor, wording, gamma):
    runs = {kinds: oracle_of(model, lacking(inputs, batch, index, kinds)).logits(softmax, tokens)
            for kinds in ((), ("audio",), ("video",), ("video", "audio"))}  # fmt: skip
    if not has_both_pieces(batch[index]):
        return runs[()]
    scores = oracle_of(model, asked(inputs, batch, index, processor, wording)).logits(softmax)
    # The byte tokenizer: an answer is told by its first letter.
    first = {need: {processor.tokenizer(word)["input_ids"][0] for word in wording.answers[need]} for need in NEEDS}
    chances = torch.stack([scores[sorted(first[need])].exp().sum() for need in ("visual", "audio", "both")])
    visual, audio, both = chances / chances.sum()
    mixed = (2 + 2 * gamma * both) * runs[()] + (1 - gamma * (both - visual)) * runs["audio",]
    mixed = mixed + (1 - gamma * (both - audio)) * runs["video",] - gamma * (visual + audio) * runs["video", "audio"]
    return mixed / 4


def has_both_pieces(sample):
    kinds = {piece[0] for piece in sample}
    return "both" in kinds or {"video", "audio"} <= kinds


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("wording", ["published", "en"])
def test_mad_equals_five_full_recomputes(thinker, processor, batch, wording):
    samples = BATCHES[batch]
    inputs = build_questions(samples, processor)
    words = PUBLISHED if wording == "published" else MODALITY_QUESTIONS[wording]

    def expected(index, tokens):
        return mad_oracle(thinker, inputs, samples, index, tokens, processor, words, GAMMA)

    context = mad(thinker, processor=processor, wording=wording)
    method = check(thinker, inputs, context, expected, do_sample=False, atol=3e-4)
    assert [not note for note in method.notes] == HAS_BOTH[batch]
    assert all(note == {ONE_MODALITY: ""} for note in method.notes if note)
    torch.testing.assert_close(method.weights.sum(-1), torch.ones(len(samples)))


def test_mad_without_contrast_weighs_both_by_two(thinker, processor):
    """gamma 0: (2, 1, 1, 0), whatever the model answers."""
    inputs = build_questions([VIDEO_AUDIO], processor)

    def expected(index, tokens):
        of = {kinds: oracle_of(thinker, lacking(inputs, [VIDEO_AUDIO], 0, kinds)).logits(softmax, tokens)
              for kinds in ((), ("audio",), ("video",))}  # fmt: skip
        return (2 * of[()] + of["audio",] + of["video",]) / 4

    check(thinker, inputs, mad(thinker, processor=processor, gamma=0.0), expected, do_sample=False)


def test_mad_needs_a_prompt_of_the_processor_and_a_wording_behind_the_question(thinker, processor):
    with mad(thinker, processor=processor), pytest.raises(ValueError, match="does not end as the processor's chat"):
        thinker.generate(**build_inputs([VIDEO_AUDIO]), max_new_tokens=1)
    turned = ModalityQuestion("Of this: {question}", PUBLISHED.answers)
    for wording, says in ((turned, "must begin with {question}, got 'Of this: '"), ("fr", "must be published, en")):
        with pytest.raises(ValueError, match=says), mad(thinker, processor=processor, wording=wording):
            pass
    with pytest.raises(ValueError, match="gamma must be 0 or more"), mad(thinker, processor=processor, gamma=-1.0):
        pass


# --- the control ------------------------------------------------------------------------------------------------------

DROPS = {"visual": ("audio",), "audio": ("video",), "both": ()}


@pytest.mark.parametrize(
    ("batch", "needs"),
    [
        ([VIDEO_AUDIO], ["audio"]),
        ([INTERLEAVED], ["visual"]),
        ([INTERLEAVED, INTERLEAVED, INTERLEAVED], ["both", "audio", "visual"]),
        ([VIDEO_AUDIO, TEXT_ONLY, AUDIO_VIDEO, VIDEO_ONLY], ["audio", "audio", "visual", "audio"]),
        ([TWO_CLIPS, VIDEO_AUDIO, TWO_CLIPS], ["visual", "both", "audio"]),
    ],
)
def test_drop_equals_the_recomputed_shorter_prompt(thinker, processor, batch, needs):
    inputs = build_questions(batch, processor)
    gone = [DROPS[need] if has_both_pieces(sample) else () for need, sample in zip(needs, batch, strict=True)]

    def expected(index, tokens):
        return oracle_of(thinker, lacking(inputs, batch, index, gone[index])).logits(softmax, tokens)

    method = check(thinker, inputs, drop(thinker, needs=needs), expected, do_sample=False)
    names = {("audio",): ["audio dropped"], ("video",): ["video dropped"], (): []}
    assert [list(note) for note in method.notes] == [names[kinds] for kinds in gone]


def test_drop_computes_fewer_rows(thinker, processor):
    """Of the shorter prompt only, also where a batch is padded to its neighbour's length."""
    inputs = build_questions([VIDEO_AUDIO, AUDIO_VIDEO], processor)
    rows = []
    decoder = find_adapter(thinker).find_decoder(thinker)
    note = decoder.layers[0].register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:2].numel()))
    with note, drop(thinker, needs=["audio", "visual"]):
        thinker.generate(**inputs, max_new_tokens=1, eos_token_id=None)
    lengths = [lacking(inputs, [VIDEO_AUDIO, AUDIO_VIDEO], index, kinds)["input_ids"].shape[1]
               for index, kinds in enumerate([("video",), ("audio",)])]  # fmt: skip
    assert sorted(rows) == sorted(lengths)


def test_drop_reads_the_question_and_asks_about_it(thinker, short_processor):
    """By a function, and by asking the model, text only."""
    questions = ["Is it loud?", "What is red?"]
    inputs = prepare_batch(short_processor, [([clip(seed)], text) for seed, text in enumerate(questions)])
    seen = []

    def need(question):
        seen.append(question)
        return "audio" if "loud" in question else "visual"

    with drop(thinker, needs=need, processor=short_processor) as method:
        found = thinker(**inputs).logits[:, -1]
        assert seen == questions and method.needs_of_last == ["audio", "visual"]
    with drop(thinker, needs=["audio", "visual"]):
        torch.testing.assert_close(thinker(**inputs).logits[:, -1], found, atol=0, rtol=0)

    router = Router(short_processor)
    decoder = find_adapter(thinker).find_decoder(thinker)
    answered = [answers_to(router, thinker, decoder, [router.prompt_ids(text)])[0].argmax() for text in questions]
    with drop(thinker, processor=short_processor) as method:
        thinker(**inputs)
        assert method.needs_of_last == [NEEDS[best] for best in answered]


def test_what_drop_refuses(thinker, processor):
    for needs, says in (("smell", 'needs must be "asked", or of visual, audio, both; got \'smell\''),
                        (["audio", "sound"], "got 'sound'")):  # fmt: skip
        with pytest.raises(ValueError, match=says), drop(thinker, needs=needs):
            pass
    with pytest.raises(ValueError, match="drop needs the model's processor"), drop(thinker):
        pass
    inputs = build_questions([VIDEO_AUDIO], processor)
    with drop(thinker, needs=["audio"] * 2), pytest.raises(ValueError, match="2 needs are given for 1 samples"):
        thinker(**inputs)
    with drop(thinker, needs="audio"), pytest.raises(ValueError, match="leave output_hidden_states unset"):
        thinker(**inputs, output_hidden_states=True)
    with drop(thinker, needs=lambda _: "nose", processor=processor), pytest.raises(ValueError, match="got 'nose'"):
        thinker(**inputs)


# --- OutRo ------------------------------------------------------------------------------------------------------------


def outro_logits(oracle, tokens, least, ratio, gamma, temperature, counted=None):
    """By loops over tokens and heads."""
    layers = oracle.decoder.layers
    hidden, seen, relaxed = {}, set(), set()

    def note(index, module, args, kwargs):
        hidden[index] = args[0][0]

    def changed(layer, out, scores, value):
        if layer >= len(layers) - 2:
            return out
        prompt = hidden[layer][: oracle.prompt].abs()
        bound = max(least, ratio * float(prompt.median()))
        sinks = [place for place in range(oracle.prompt) if float(prompt[place].max()) >= bound]
        seen.update(sinks)
        if not sinks:
            return out
        out = out.clone()
        if layer % max(1, len(layers) // 7) == 0:
            for place in set(sinks) - relaxed:
                out[:, place] = (scores[:, place : place + 1, : oracle.prompt].softmax(-1) @ value[:, : oracle.prompt])[
                    :, 0
                ]
            relaxed.update(sinks)
        for head in range(len(out)):
            towards = value[head, sinks].mean(0)
            for place in set(range(out.shape[1])) - seen:
                own = out[head, place].clone()
                gate = torch.tanh(torch.relu(functional.cosine_similarity(own, towards, dim=0)) / temperature)
                moved = own + gate * gamma * (own @ towards).abs() / (towards @ towards) * towards
                out[head, place] = moved * own.norm() / moved.norm()
        return out

    hooks = [layer.register_forward_pre_hook(functools.partial(note, index), with_kwargs=True)
             for index, layer in enumerate(layers)]  # fmt: skip
    try:
        logits = oracle.logits(softmax, tokens, changed)
    finally:
        for hook in hooks:
            hook.remove()
    if counted is not None:
        counted.append(len(seen))
    return logits


def thresholds(model, inputs, share):
    """A bound that about ``share`` of the prompts' tokens reach at the first layer, and the same as a ratio."""
    caught = []
    layer = find_adapter(model).find_decoder(model).layers[0]
    with layer.register_forward_pre_hook(lambda module, args: caught.append(args[0].abs())):
        model(**inputs)
    sizes = caught[0][inputs["attention_mask"] == 1]
    bound = 0.9995 * float(sizes.amax(-1).quantile(1 - share))  # no token is right at it
    return {"least": {"least": bound, "ratio": 0.0}, "ratio": {"least": 0.0, "ratio": bound / float(sizes.median())}}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("by", ["least", "ratio"])
def test_outro_equals_full_recomputes(thinker, processor, batch, by):
    inputs = build_questions(BATCHES[batch], processor)
    given = decoder_inputs(thinker, **inputs)
    settings = {**thresholds(thinker, inputs, 0.1)[by], "gamma": 3.0, "temperature": 0.1}
    counted = {}

    def expected(index, tokens):
        counted[index] = []
        return outro_logits(Oracle(thinker, given, index), tokens, **settings, counted=counted[index])

    method = check(thinker, inputs, outro(thinker, **settings), expected, do_sample=False, atol=3e-4)
    assert method.sink_tokens == [counted[index][0] for index in range(len(method.sink_tokens))]
    assert [NO_SINK in note for note in method.notes] == [count == 0 for count in method.sink_tokens]
    assert any(method.sink_tokens)
    assert not torch.allclose(thinker(**inputs).logits[:, -1], with_outro(thinker, inputs, settings), atol=1e-2)


def with_outro(model, inputs, settings):
    with outro(model, **settings):
        return model(**inputs).logits[:, -1]


def test_outro_is_the_plain_model_where_there_is_no_sink(thinker, processor):
    """Random weights have none by the published bounds; the method says so."""
    inputs = build_questions([VIDEO_AUDIO, TEXT_ONLY], processor)
    plain = thinker(**inputs).logits
    with outro(thinker) as method:
        assert torch.equal(thinker(**inputs).logits, plain)
        assert method.sink_tokens == [0, 0] and method.notes == [{NO_SINK: ""}] * 2
        assert method_of(thinker) is method
    assert method_of(thinker) is None


def test_outro_acts_on_text_alone_as_in_a_batch(thinker, processor):
    batch = build_questions([VIDEO_AUDIO, TEXT_ONLY], processor)
    settings = thresholds(thinker, batch, 0.2)["least"]
    alone = lacking(batch, [VIDEO_AUDIO, TEXT_ONLY], 1, ())
    expected = with_outro(thinker, batch, settings)[1]
    torch.testing.assert_close(with_outro(thinker, alone, settings)[0], expected, atol=1e-4, rtol=0)
    embeds = {
        "inputs_embeds": thinker.get_input_embeddings()(alone["input_ids"]),
        "attention_mask": alone["attention_mask"],
    }
    torch.testing.assert_close(with_outro(thinker, embeds, settings)[0], expected, atol=1e-4, rtol=0)


def test_what_outro_refuses(thinker):
    for settings, says in (({"least": -1.0}, "least must be 0 or more"), ({"temperature": 0.0}, "temperature must be")):
        with pytest.raises(ValueError, match=says), outro(thinker, **settings):
            pass

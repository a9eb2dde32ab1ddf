"""The baselines, cached and in batches, against full recomputes of one sample with whole attention matrices."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import GenerationConfig

import fmd_ext
from fmd_ext.adapters import AUDIO, TEXT, VISUAL
from fmd_ext.engine.reference import decoder_inputs
from fmd_ext.lab.baselines import avcd, drop, mad, outro, pai, vcd
from fmd_ext.lab.baselines.decoding import plausible
from fmd_ext.lab.baselines.vcd import diffused
from fmd_ext.lab.tiny import tiny_processor
from omni_inputs import AUDIO_VIDEO, VIDEO_AUDIO, build_inputs
from recomputed import BATCHES, OPTIONS, STEPS, WORDS_ONLY, Oracle, build_questions, check, softmax


def cut(contrasted, plain, beta):
    return torch.where(plain.softmax(-1) < beta * plain.softmax(-1).max() * (1 - 1e-6), -torch.inf, contrasted)


def vcd_oracle(oracle, noised, tokens, alpha, beta):
    plain = oracle.logits(softmax, tokens)
    return cut((1 + alpha) * plain - alpha * noised.logits(softmax, tokens), plain, beta)


def pai_oracle(oracle, tokens, alpha, gamma, modalities, beta=0.1, first_layer=2):
    def raised(layer, scores):
        if layer >= first_layer:
            wanted = torch.isin(oracle.now, torch.tensor(modalities))[None].repeat(len(scores[0]), 1)
            wanted[: oracle.prompt - 1] = False  # earlier rows are no longer being decided
            scores = torch.where(wanted & scores.isfinite(), scores + alpha * scores.abs(), scores)
        return scores.softmax(-1)

    def blind(layer, scores):
        hidden = (oracle.now != TEXT)[None] & ~torch.eye(len(oracle.now), dtype=torch.bool)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1)

    plain = oracle.logits(raised, tokens)
    if gamma == 1:
        return plain
    contrasted = gamma * plain.log_softmax(-1) - (gamma - 1) * oracle.logits(blind, tokens).log_softmax(-1)
    return cut(contrasted, plain, beta)


def avcd_oracle(oracle, tokens, alpha, beta, min_entropy, last_layer=3):
    plain = oracle.logits(softmax, tokens)
    labels = oracle.labels
    entropy = torch.distributions.Categorical(logits=plain).entropy()
    if entropy < min_entropy or not {VISUAL, AUDIO} <= set(labels.tolist()):
        return plain
    rows = []

    def recorded(layer, scores):
        weights = scores.softmax(-1)
        if layer < last_layer:
            rows.append(weights[:, -1])
        return weights

    oracle.logits(recorded)
    mean = torch.stack(rows).mean(0)  # [heads, prompt]
    threshold = mean.quantile(0.5, dim=-1).mean()
    after = torch.arange(len(labels)) > int((labels != TEXT).nonzero().max())
    regions = {"language": after, "video": labels == VISUAL, "audio": labels == AUDIO}
    per_position = {name: float(mean.mean(0)[place].mean()) for name, place in regions.items()}
    first, second = [name for name in regions if name != max(per_position, key=per_position.get)]

    def without(*names):
        def weights(layer, scores):
            weights = scores.softmax(-1)
            if layer == last_layer:
                return weights
            hidden = weights[:, oracle.prompt - 1] > threshold
            hidden[:, : oracle.prompt] &= torch.stack([regions[name] for name in names]).any(0)
            hidden[:, oracle.prompt :] = False
            own = torch.eye(scores.shape[-1], dtype=torch.bool)
            return scores.masked_fill(hidden[:, None] & ~own, -torch.inf).softmax(-1)

        return oracle.logits(weights, tokens)

    mixed = (2 + 2 * alpha) * plain - 2 * alpha * without(first, second) + without(first) + without(second)
    return cut(mixed / 4, plain, beta)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("modalities", [("visual",), ("visual", "audio")], ids=len)
def test_vcd_equals_two_full_recomputes(thinker, batch, modalities):
    inputs = build_inputs(BATCHES[batch])
    noised = dict(inputs)
    noised["pixel_values_videos"] = diffused(inputs["pixel_values_videos"], 700, 3, inputs["video_grid_thw"])
    if "audio" in modalities:
        noised["input_features"] = diffused(inputs["input_features"], 700, 3)
    given, given_noised = decoder_inputs(thinker, **inputs), decoder_inputs(thinker, **noised)

    def expected(sample, tokens):
        pair = (Oracle(thinker, given, sample), Oracle(thinker, given_noised, sample))
        return vcd_oracle(*pair, tokens, alpha=0.8, beta=0.05)

    context = vcd(thinker, contrast=0.8, beta=0.05, noise_step=700, modalities=modalities, seed=3)
    check(thinker, inputs, context, expected, do_sample=False)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("settings", [{"gamma": 1.0}, {"gamma": 1.4, "modalities": ("audio",)}], ids=len)
def test_pai_equals_full_recomputes(thinker, batch, settings):
    inputs = build_inputs(BATCHES[batch])
    given = decoder_inputs(thinker, **inputs)
    modalities = [AUDIO] if "modalities" in settings else [VISUAL, AUDIO]

    def expected(sample, tokens):
        return pai_oracle(Oracle(thinker, given, sample), tokens, 0.7, settings["gamma"], modalities)

    check(thinker, inputs, pai(thinker, boost=0.7, **settings), expected, do_sample=False)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("min_entropy", [0.0, "median"])
def test_avcd_equals_full_recomputes(thinker, batch, min_entropy):
    """With a gate at the middle of the entropies some steps are contrasted and others catch up later."""
    inputs = build_inputs(BATCHES[batch])
    given = decoder_inputs(thinker, **inputs)
    if min_entropy == "median":
        plain = thinker.generate(**inputs, max_new_tokens=STEPS, do_sample=False, **OPTIONS).logits
        min_entropy = float(torch.distributions.Categorical(logits=torch.stack(plain)).entropy().median()) + 1e-3

    def expected(sample, tokens):
        return avcd_oracle(Oracle(thinker, given, sample), tokens, 0.5, 0.2, min_entropy)

    check(thinker, inputs, avcd(thinker, contrast=0.5, beta=0.2, min_entropy=min_entropy), expected, do_sample=False)


PROCESSOR = tiny_processor()
METHODS = {
    "vcd": vcd,
    "pai": pai,
    "avcd": lambda model: avcd(model, min_entropy=0.0),
    "mad": lambda model: mad(model, processor=PROCESSOR),
    "outro": lambda model: outro(model, least=0.0, ratio=1.0),
    "drop": lambda model: drop(model, needs="audio"),
}


@pytest.mark.parametrize("name", METHODS)
def test_sampling_draws_from_the_changed_distribution(thinker, name):
    """With one token allowed, sampling is greedy; with a seed it repeats; and it differs from the plain model's."""
    inputs = build_questions([VIDEO_AUDIO, AUDIO_VIDEO], PROCESSOR)
    options = {"max_new_tokens": 4, "eos_token_id": None}
    with METHODS[name](thinker):
        greedy = thinker.generate(**inputs, **options, do_sample=False)
        assert torch.equal(thinker.generate(**inputs, **options, do_sample=True, top_k=1), greedy)
        draws = []
        for _ in range(2):
            torch.manual_seed(3)
            draws.append(thinker.generate(**inputs, **options, do_sample=True))
        changed = thinker(**inputs).logits[:, -1]
    assert torch.equal(*draws)
    assert not torch.equal(thinker(**inputs).logits[:, -1], changed)


@pytest.mark.parametrize("name", METHODS)
def test_a_second_turn_and_a_model_left_as_it_was(thinker, name):
    modules = list(thinker.modules())
    before = [dict(module.__dict__) for module in modules]
    inputs = build_questions([VIDEO_AUDIO], PROCESSOR)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, **WORDS_ONLY}
    with METHODS[name](thinker):
        cache = thinker(**inputs).past_key_values
        words = torch.cat([inputs["input_ids"], torch.tensor([[40, 41, 42]])], 1)
        again = {"input_ids": words, "attention_mask": torch.ones_like(words)}
        continued = thinker.generate(**again, past_key_values=cache, **options)
        assert continued.shape[1] == words.shape[1] + 3
        with pytest.raises(ValueError, match="all clips in the first call"):
            thinker(**inputs, past_key_values=cache)
        cache.crop(-1)
        with pytest.raises(ValueError, match="nobody has cut"):
            thinker(input_ids=torch.tensor([[40]]), past_key_values=cache)
    rope_deltas = {"rope_deltas"}  # transformers' own memory of the last prompt
    for module, state in zip(modules, before, strict=True):
        assert module.__dict__.keys() - rope_deltas == state.keys() - rope_deltas
        assert module.__dict__.get("config") is state.get("config")


def test_what_others_have_put_in_place_of_forward_stays(thinker):
    """accelerate, for one, puts a forward of its own on the instance."""
    own, calls = thinker.forward, []

    @functools.wraps(own)
    def forward(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    thinker.forward = forward
    try:
        with vcd(thinker):
            thinker.generate(**build_inputs([VIDEO_AUDIO]), max_new_tokens=1)
        assert thinker.forward is forward and len(calls) == 2
    finally:
        del thinker.forward


def test_without_plausibility_every_token_is_possible():
    plain, contrasted = torch.tensor([[0.0, 5.0, -9.0]]), torch.tensor([[1.0, 2.0, 3.0]])
    assert torch.equal(plausible(contrasted, plain, 0.0), contrasted)
    assert plausible(contrasted, plain, 1.0).tolist() == [[-torch.inf, 2.0, -torch.inf]]


def test_noise_of_images_is_drawn_by_image(thinker):
    """As that of each image alone; audio and text stay as they are, and so does what the caller has given."""
    two = build_inputs([[("text", 2), ("image", (4, 4)), ("image", (4, 8)), ("audio", 20)]])
    with vcd(thinker, noise_step=700, seed=3) as method:
        noised = method.arguments("noised", two)
    alone = diffused(two["pixel_values"][16:], 700, 3, two["image_grid_thw"][1:])
    assert torch.equal(noised["pixel_values"][16:], alone)
    assert not torch.equal(alone, diffused(two["pixel_values"][16:], 700, 4, two["image_grid_thw"][1:]))
    assert [name for name in two if noised[name] is not two[name]] == ["pixel_values"]


def test_noise_follows_the_schedule():
    """Variance preserving: the kept part and the noise add up to one; the same noise for every clip."""
    features = torch.zeros(8, 5000)
    late = diffused(features, 999, 0)
    assert late.std() == pytest.approx(
        (1 - diffused(torch.ones(1, 1) * 1e6, 999, 0).item() ** 2 / 1e12) ** 0.5, rel=0.02
    )
    assert torch.equal(late[0], late[7])
    early = diffused(torch.ones(2, 5000), 0, 0)
    assert (early - 1).abs().max() < 0.05
    grid = torch.tensor([[1, 2, 2], [2, 2, 2]])
    both = diffused(torch.zeros(12, 5), 500, 0, grid)
    assert torch.equal(both[:4], diffused(torch.zeros(4, 5), 500, 0, grid[:1]))


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        (vcd, {"contrast": -1}, "contrast must be 0 or more, got -1"),
        (vcd, {"noise_step": 1000}, r"noise_step must be in \[0, 999\], got 1000"),
        (vcd, {"modalities": ("smell",)}, r'modalities must be \("visual",\), \("audio",\) or both, got \(.smell'),
        (vcd, {"modalities": "audio"}, "or both, got 'audio'"),
        (pai, {"gamma": 0.5}, "gamma must be 1 or more"),
        (pai, {"modalities": ()}, "modalities must be"),
        (avcd, {"beta": 1.5}, r"beta must be in \[0, 1\]"),
    ],
)
def test_settings_out_of_range(thinker, method, settings, says):
    with pytest.raises(ValueError, match=says), method(thinker, **settings):
        pass


def test_what_is_refused(thinker):
    inputs = build_inputs([VIDEO_AUDIO])
    with pytest.raises(TypeError, match="contrast must be a number, got 'much'"), avcd(thinker, contrast="much"):
        pass
    with vcd(thinker), pytest.raises(ValueError, match="leave num_beams unset"):
        thinker.generate(**inputs, num_beams=2, max_new_tokens=2)
    with vcd(thinker), pytest.raises(ValueError, match="leave num_beams unset"):
        thinker.generate(inputs["input_ids"], GenerationConfig(num_beams=2, max_new_tokens=2))
    with vcd(thinker), pytest.raises(ValueError, match="give pixel values, not mm_encoder_outputs"):
        thinker(**inputs, mm_encoder_outputs={"video": torch.zeros(1)})
    with vcd(thinker), pytest.raises(ValueError, match="leave prompt_lookup_num_tokens unset"):
        thinker.generate(**inputs, prompt_lookup_num_tokens=2, max_new_tokens=2)
    fmd_ext.patch(thinker)
    with pytest.raises(ValueError, match="unpatch it first"), vcd(thinker):
        pass

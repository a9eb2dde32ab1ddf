"""Channel-wise fusion: joint positions, which mix both modalities, with one embedding per branch."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import fmd_ext
from fmd_ext import FMDConfig
from fmd_ext.engine.reference import reference_hidden

HIDDEN = 96
# Joint tokens alone; beside a sample with separate tokens and one with a single modality; padded, and with a long tail.
LABELS = torch.tensor(
    [
        [-1, -1, 0, 0, 3, 3, 3, 3, 3, 0, 0, 0],
        [0, 1, 1, 2, 1, 2, 2, 0, 2, 1, 0, 0],
        [-1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [0, 3, 0, 0, 3, 3, 2, 2, 1, 1, 0, 0],
    ]
)
MASK = (LABELS >= 0).long()
POSITIONS = (MASK.cumsum(-1) - 1).clamp(min=0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def embeddings(samples: slice = slice(None)):
    """Embeddings and those of both branches; away from joint positions the branches' hold what must not be read."""
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(*LABELS.shape, HIDDEN, generator=generator)
    branches = torch.randn(2, *LABELS.shape, HIDDEN, generator=generator)
    branches[:, LABELS != 3] = torch.nan
    return embeds[samples], branches[:, samples]


def two_passes(model, embeds, branches, fork_layers, text_weight=0.5):
    """Logits of one sample of text and joint positions: two runs of the first layers, an average, one of the rest."""
    decoder = model.model
    rotary = decoder.rotary_emb(embeds, torch.arange(embeds.shape[1])[None])
    length = embeds.shape[1]
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]

    def run(hidden, layers):
        for layer in layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        return hidden

    visual, audio = (run(branch, decoder.layers[:fork_layers]) for branch in branches)
    merged = text_weight * visual + (1 - text_weight) * audio
    return model.lm_head(decoder.norm(run(merged, decoder.layers[fork_layers:])))


@pytest.mark.parametrize("fork_layers", [1, 2, 3])
def test_is_two_passes_and_a_plain_average(model, fork_layers):
    embeds, branches = embeddings(slice(1))
    labels = LABELS[:1].clamp(min=0)
    whole = torch.where((labels == 3)[..., None], branches, embeds)
    expected = two_passes(model, embeds, whole, fork_layers)
    fmd_ext.patch(model, adapter="text", fork_layers=fork_layers, alpha=0.9)  # alpha has no effect
    actual = model(inputs_embeds=embeds, branch_embeds=branches, modality_labels=labels).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [{"fork_layers": 1}, {"fork_layers": 3, "text_weight": 0.3}, {"fork_layers": 2, "mask_scale": 0.4}],
    ids=str,
)
def test_logits_equal_the_reference(model, settings):
    config = FMDConfig(alpha=0.7, **settings).resolve(FMDConfig(), 3)
    embeds, branches = embeddings()
    expected = model.lm_head(reference_hidden(model.model, config, embeds, LABELS, POSITIONS, branch_embeds=branches))
    fmd_ext.patch(model, config, adapter="text")
    call = {"attention_mask": MASK, "position_ids": POSITIONS, "modality_labels": LABELS}
    actual = model(inputs_embeds=embeds, branch_embeds=branches, **call).logits
    torch.testing.assert_close(actual[MASK.bool()], expected[MASK.bool()], atol=1e-4, rtol=0)


def test_the_bare_decoder_can_be_patched_too(model):
    config = FMDConfig(fork_layers=2).resolve(FMDConfig(), 3)
    embeds, branches = embeddings(slice(3, 4))
    expected = reference_hidden(model.model, config, embeds, LABELS[3:], branch_embeds=branches)
    fmd_ext.patch(model.model, config, adapter="text")
    call = {"modality_labels": LABELS[3:], "branch_embeds": branches}
    actual = model.model(inputs_embeds=embeds, **call).last_hidden_state
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_generate_equals_one_full_recompute_per_step(model):
    """Greedy tokens of a mixed batch; and beams, which repeat the samples, give what each sample gives alone."""
    embeds, branches = embeddings()
    fmd_ext.patch(model, adapter="text", fork_layers=2)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": MASK}
    call = {"branch_embeds": branches, "modality_labels": LABELS}
    tokens = model.generate(inputs_embeds=embeds, **call, **options)
    beams = model.generate(inputs_embeds=embeds, **call, **options, num_beams=2, num_return_sequences=2)
    one = model.generate(
        inputs_embeds=embeds[3:],
        branch_embeds=branches[:, 3:],
        modality_labels=LABELS[3:],
        **{**options, "attention_mask": MASK[3:]},
        num_beams=2,
        num_return_sequences=2,
    )
    assert torch.equal(beams[6:], one)

    mask = MASK
    for step in range(5):
        whole = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        call["modality_labels"] = torch.nn.functional.pad(LABELS, (0, step))  # words are text
        logits = model(inputs_embeds=embeds, **whole, **call).logits[:, -1]
        assert logits.argmax(-1).tolist() == tokens[:, step].tolist()
        embeds = torch.cat([embeds, model.get_input_embeddings()(tokens[:, step : step + 1])], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)


def test_a_second_clip_in_a_later_turn(model):
    """Two calls on one cache equal one call: branch_embeds belong to the positions of their own call."""
    embeds, branches = embeddings(slice(3, 4))
    embeds, branches, labels = embeds.repeat(1, 2, 1), branches.repeat(1, 1, 2, 1), LABELS[3:].repeat(1, 2)
    fmd_ext.patch(model, adapter="text", fork_layers=2)
    whole = model(inputs_embeds=embeds, branch_embeds=branches, modality_labels=labels).logits
    cache = None
    for part in (slice(0, 9), slice(9, 24)):
        call = {"modality_labels": labels, "past_key_values": cache, "use_cache": True}
        out = model(inputs_embeds=embeds[:, part], branch_embeds=branches[:, :, part], **call)
        cache = out.past_key_values
        torch.testing.assert_close(out.logits, whole[:, part], atol=1e-4, rtol=0)


def test_zero_fork_layers_is_the_untouched_model(model):
    embeds, branches = embeddings()
    vanilla = model(inputs_embeds=embeds, attention_mask=MASK).logits
    fmd_ext.patch(model, adapter="text", fork_layers=0)
    call = {"branch_embeds": branches, "modality_labels": LABELS}
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=MASK, **call).logits, vanilla)


def test_what_is_refused(model):
    embeds, branches = embeddings(slice(3, 4))
    labels = LABELS[3:]
    with fmd_ext.patch(model, adapter="text", masking="attention"):
        with pytest.raises(ValueError, match="joint position mixes both modalities, so masking='attention'"):
            model(inputs_embeds=embeds, branch_embeds=branches, modality_labels=labels)
    fmd_ext.patch(model, adapter="text")
    needs = r"joint positions \(label 3\) need branch_embeds \[2, 1, 12, 96\].*got "
    with pytest.raises(ValueError, match=needs + "None"):
        model(inputs_embeds=embeds, modality_labels=labels)
    with pytest.raises(ValueError, match=needs + r"\[1, 1, 12, 96\]"):
        model(inputs_embeds=embeds, branch_embeds=branches[:1], modality_labels=labels)
    with pytest.raises(ValueError, match=needs + r"\[2, 1, 4, 96\]"):
        model(inputs_embeds=embeds, branch_embeds=branches[:, :, :4], modality_labels=labels)
    for call in ({"modality_labels": LABELS[1:2]}, {}):
        with pytest.raises(ValueError, match="branch_embeds are read at joint positions only"):
            model(inputs_embeds=embeds, branch_embeds=branches, **call)
        with pytest.raises(ValueError, match="branch_embeds are read at joint positions only"):
            model.model(inputs_embeds=embeds, branch_embeds=branches, **call)

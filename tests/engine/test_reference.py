"""The reference itself, against the vanilla model and against the paper's two passes written with vanilla decoders."""

from __future__ import annotations

import copy

import pytest
import torch

from fmd_ext import FMDConfig
from fmd_ext.adapters import AUDIO, TEXT, VISUAL, find_adapter
from fmd_ext.engine.reference import decoder_inputs, reference_hidden, reference_logits
from omni_inputs import AUDIO_ONLY, INTERLEAVED, TEXT_ONLY, VIDEO_AUDIO, VIDEO_ONLY, build_inputs


def resolved(**settings):
    return FMDConfig(**settings).resolve(FMDConfig(), num_layers=4)


@pytest.mark.parametrize(
    ("sample", "fork_layers"), [(VIDEO_AUDIO, 0), (INTERLEAVED, 0), (TEXT_ONLY, 2), (VIDEO_ONLY, 2), (AUDIO_ONLY, 4)]
)
def test_equals_vanilla_where_nothing_forks(thinker, sample, fork_layers):
    inputs = build_inputs([sample])
    logits = reference_logits(thinker, resolved(fork_layers=fork_layers), **inputs)
    torch.testing.assert_close(logits, thinker(**inputs).logits, atol=1e-4, rtol=0)


def partial_decoder(decoder, layers, norm):
    part = copy.copy(decoder)
    part._modules = dict(decoder._modules)
    part.layers, part.config = torch.nn.ModuleList(layers), copy.copy(decoder.config)
    part.config.num_hidden_layers = len(layers)
    part.norm = norm
    return part


@pytest.mark.parametrize("sample", [VIDEO_AUDIO, INTERLEAVED])
@pytest.mark.parametrize("mask_scale", [0.0, 0.3])
def test_zero_masking_is_two_passes_of_the_vanilla_decoder(thinker, sample, mask_scale):
    decoder = find_adapter(thinker).find_decoder(thinker)
    config = resolved(fork_layers=2, alpha={"visual": 0.9, "audio": 0.6}, text_weight=0.3, mask_scale=mask_scale)
    given = decoder_inputs(thinker, **build_inputs([sample]))
    embeds, labels, positions = given["inputs_embeds"], given["labels"], given["position_ids"]

    def early(masked_label):
        masked = torch.where((labels == masked_label)[..., None], embeds * mask_scale, embeds)
        part = partial_decoder(decoder, decoder.layers[:2], torch.nn.Identity())
        return part(inputs_embeds=masked, position_ids=positions, use_cache=False).last_hidden_state

    visual_branch, audio_branch = early(AUDIO), early(VISUAL)
    weight = torch.zeros(labels.shape)
    weight[labels == TEXT], weight[labels == VISUAL], weight[labels == AUDIO] = 0.3, 0.9, 1 - 0.6
    merged = weight[..., None] * visual_branch + (1 - weight[..., None]) * audio_branch
    late = partial_decoder(decoder, decoder.layers[2:], decoder.norm)
    expected = late(inputs_embeds=merged, position_ids=positions, use_cache=False).last_hidden_state
    torch.testing.assert_close(reference_hidden(decoder, config, **given), expected, atol=1e-4, rtol=0)


def test_attention_masking_is_the_vanilla_decoder_on_the_shorter_sequences(thinker):
    """Without the masked positions (their M-RoPE positions kept) a branch is an ordinary causal sequence."""
    decoder = find_adapter(thinker).find_decoder(thinker)
    config = resolved(fork_layers=4, masking="attention", text_weight=1.0)
    given = decoder_inputs(thinker, **build_inputs([VIDEO_AUDIO]))
    keep = given["labels"][0] != AUDIO
    expected = decoder(
        inputs_embeds=given["inputs_embeds"][:, keep], position_ids=given["position_ids"][..., keep], use_cache=False
    ).last_hidden_state
    actual = reference_hidden(decoder, config, **given)[:, keep]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)

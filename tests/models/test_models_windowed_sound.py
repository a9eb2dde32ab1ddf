"""The windows of the video-SALMONN 2 family's sound, against recordings of the official code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import InstructBlipQFormerConfig, WhisperFeatureExtractor

from fmd_ext.models.windowed_sound import WindowedQFormer, log_mel_windows, num_windows, window_frames
from paths import FIXTURES
from seeded_weights import fill, seeded_tensor

RECORDED = np.load(FIXTURES / "video_salmonn2.npz")
PREFIX = "speech_Qformer."


@pytest.fixture(scope="module")
def qformer():
    config = InstructBlipQFormerConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        encoder_hidden_size=32,
        cross_attention_frequency=1,
    )
    module = WindowedQFormer(config).eval()
    fill({PREFIX + name: tensor for name, tensor in module.state_dict().items()}, 6)
    return module


@pytest.mark.parametrize("case, seconds, stride", [("apart", 0.5, 0.5), ("overlapping", 0.333333, 0.2)])
def test_windows_equal_the_official_ones(qformer, case, seconds, stride):
    states = torch.from_numpy(np.random.RandomState(7).standard_normal((2, 110, 32)).astype(np.float32))
    queries = torch.from_numpy(seeded_tensor("speech_query_tokens", (1, 1, 32), 6))
    window, stride = window_frames(seconds), window_frames(stride)
    tokens = qformer(states, queries, window, stride)
    official = RECORDED[f"windows_{case}"]
    assert tuple(tokens.shape) == official.shape and official.shape[1] == num_windows(110, window, stride)
    np.testing.assert_allclose(tokens.numpy(), official, atol=1e-4, rtol=0)


def test_several_queries_stay_together(qformer):
    """[window 0: query 0, query 1; window 1: ...], and a window's tokens do not depend on the others'."""
    states, queries = torch.randn(1, 50, 32), torch.randn(1, 2, 32)
    both = qformer(states, queries, 25, 25)
    alone = qformer(states[:, 25:], queries, 25, 25)
    assert both.shape == (1, 4, 32)
    torch.testing.assert_close(both[:, 2:], alone)


def test_a_published_sound_window_has_60_tokens():
    assert num_windows(1500, window_frames(0.5), window_frames(0.5)) == 60


def test_log_mel_windows_equal_the_official_ones():
    """Of 3.4 and of 40.8 s of the recorded clip's samples; the second window of the latter is two thirds silence."""
    extractor = WhisperFeatureExtractor(feature_size=16)
    wave = (np.load(FIXTURES / "videollama2.npz")["wave16"] / 2**15).astype(np.float32)
    short = log_mel_windows(extractor, wave)
    assert short.shape == (1, 16, 3000)
    np.testing.assert_allclose(short[0, :, :400:5].numpy(), RECORDED["log_mel"], atol=1e-4)
    long = log_mel_windows(extractor, np.tile(wave, 12))
    assert long.shape == (2, 16, 3000)
    np.testing.assert_allclose(long[:, :, ::150].numpy(), RECORDED["log_mel_long"], atol=1e-4)

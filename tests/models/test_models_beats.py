"""The BEATs port against recordings of the official code: filter bank, features, names of the parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fmd_ext.models.beats import Beats, BeatsConfig, fbank
from paths import FIXTURES
from seeded_weights import fill, seeded_tensor

RECORDED = np.load(FIXTURES / "beats.npz")
SMALL = {
    "embed_dim": 32,
    "encoder_layers": 3,
    "encoder_embed_dim": 48,
    "encoder_ffn_embed_dim": 64,
    "encoder_attention_heads": 4,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "num_buckets": 32,
    "max_distance": 64,
    "predictor_class": 7,
}


def waveform():
    """A rising tone that stops, with noise that stops later: the last frames are silent."""
    noise = np.random.RandomState(7).standard_normal(16000)
    t = np.arange(16000) / 16000
    return (0.3 * np.sin(2 * np.pi * 440 * t * (1 + t)) * (t < 0.7) + 0.01 * noise * (t < 0.9)).astype(np.float32)


def beats(seed, **settings):
    model = Beats(BeatsConfig(**SMALL, **settings)).eval()
    fill(model.state_dict(), seed)
    return model


def close(ours, official):
    assert ours.shape == official.shape
    np.testing.assert_allclose(ours.numpy(), official, atol=1e-4, rtol=0)


def test_filter_bank_equals_kaldis():
    frames = fbank(waveform())
    assert frames.shape == (98, 128) and frames.dtype == torch.float32
    np.testing.assert_allclose(frames[::3].numpy(), RECORDED["fbank"], atol=1e-3, rtol=0)
    assert np.abs(frames[::3].numpy() - RECORDED["fbank"]).mean() < 1e-5


@pytest.mark.parametrize("wrong", [np.zeros(399, np.float32), np.zeros((2, 16000), np.float32)])
def test_filter_bank_refuses_what_is_no_sound(wrong):
    with pytest.raises(ValueError, match=r"at least 400 of them, got \["):
        fbank(wrong)


def test_features_equal_videollama2s():
    """VideoLLaMA2's copy of BEATs: DeepNorm, gated position bias, and an epsilon in the weight norm."""
    model = beats(1, weight_norm_eps=1e-6)
    features, mask = model(fbank(waveform())[None], torch.zeros(1, 98, dtype=torch.bool))
    close(features[0], RECORDED["deep_norm"])
    assert not mask.any()
    close(model(fbank(waveform())[None])[0][0], RECORDED["deep_norm"])


@pytest.mark.parametrize(
    "case,settings",
    [
        ("plain", {"deep_norm": False}),
        ("norm_first", {"deep_norm": False, "layer_norm_first": True}),
        ("ungated", {"gru_rel_pos": False}),
    ],
)
def test_features_equal_microsofts_in_a_padded_batch(case, settings):
    model = beats(2, finetuned_model=False, **settings)
    both = torch.stack([fbank(waveform()), fbank(waveform()[::-1])])
    padding = torch.zeros(2, 16000, dtype=torch.bool)
    padding[1, 10000:] = True
    features, mask = model(both, padding)
    np.testing.assert_array_equal(mask.numpy(), RECORDED["mask"])
    close(features, RECORDED[case])


def official_state(names):
    shapes = {name: tuple(tensor.shape) for name, tensor in beats(1).state_dict().items()}
    table = "encoder.layers.0.self_attn.relative_attention_bias.weight"
    return {n: torch.from_numpy(seeded_tensor(n, shapes.get(n, shapes[table]), 1)) for n in names}


def test_official_names_load():
    """Every layer of the official state dict repeats the one table of position biases; all else is named alike."""
    official = official_state(RECORDED["names"])
    model = Beats(BeatsConfig(**SMALL, weight_norm_eps=1e-6)).eval()
    model.load_state_dict(official, strict=True)
    assert len(official) - len(model.state_dict()) == SMALL["encoder_layers"] - 1
    close(model(fbank(waveform())[None])[0][0], RECORDED["deep_norm"])


def test_saved_folder_has_the_official_names_and_loads(tmp_path):
    from safetensors.torch import load_file, save_file

    model = beats(1, weight_norm_eps=1e-6)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) <= set(RECORDED["names"].tolist())
    save_file(official_state(RECORDED["names"]), tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, report = Beats.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    close(again(fbank(waveform())[None])[0][0], RECORDED["deep_norm"])


def test_config_takes_the_cfg_entry_of_a_checkpoint():
    config = BeatsConfig(**{"encoder_layers": 2, "encoder_layerdrop": 0.05, "dropout": 0.1})
    assert config.num_hidden_layers == 2 and config.encoder_embed_dim == config.hidden_size == 768


def test_what_is_not_supported_is_refused():
    with pytest.raises(ValueError, match="activation_fn 'glu': accepted are gelu"):
        Beats(BeatsConfig(**SMALL, activation_fn="glu"))
    with pytest.raises(ValueError, match="exclude each other"):
        Beats(BeatsConfig(**SMALL, layer_norm_first=True))


def test_random_weights_are_finite_and_normed():
    model = Beats(BeatsConfig(**SMALL)).eval()
    assert torch.isfinite(model(fbank(waveform())[None])[0]).all()
    conv = model.encoder.pos_conv[0]
    torch.testing.assert_close(conv.weight_g, conv.weight_v.norm(dim=(0, 1), keepdim=True))

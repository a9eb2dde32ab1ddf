"""FMDConfig: defaults, overrides and every value that must be refused."""

from __future__ import annotations

import json
import math

import pytest

from fmd_ext import FMDConfig


def test_defaults_are_the_papers_where_known():
    config = FMDConfig().resolve(FMDConfig(), num_layers=28)
    assert config == FMDConfig(fork_layers=7, masking="zero", mask_scale=0.0, alpha=0.8, text_weight=0.5)


def test_shallow_models_still_fork():
    assert FMDConfig().resolve(FMDConfig(), num_layers=2).fork_layers == 1


def test_own_settings_win_over_family_defaults_over_package_defaults():
    config = FMDConfig(alpha=0.6).resolve(FMDConfig(alpha=0.9, text_weight=0.3), num_layers=8)
    assert (config.alpha, config.text_weight, config.mask_scale) == (0.6, 0.3, 0.0)


def test_family_soft_masking_does_not_reach_attention_masking():
    config = FMDConfig(masking="attention").resolve(FMDConfig(mask_scale=0.5), num_layers=8)
    assert config.mask_scale == 0.0


def test_alpha_per_modality():
    config = FMDConfig(alpha={"audio": 1, "visual": 0.25}, text_weight=0.5).resolve(FMDConfig(), 4)
    assert config.merge_weights == (0.5, 0.25, 1.0, 0.5)
    assert config == FMDConfig(alpha={"visual": 0.25, "audio": 1.0}).resolve(FMDConfig(), 4)


def test_equal_settings_are_one_key():
    """The decode runner keeps its steps by the settings."""
    weights = {"visual": 0.25, "audio": 1.0}
    for name in ("alpha", "text_weight"):
        one, other = FMDConfig(**{name: weights}), FMDConfig(**{name: dict(reversed(weights.items()))})
        assert one == other and hash(one) == hash(other) and len({one, other, FMDConfig(**{name: 0.5})}) == 2


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"fork_layers": -1}, ValueError, "fork_layers must be 0 or more, got -1"),
        ({"fork_layers": 1.5}, TypeError, "fork_layers must be a whole number or .auto., got 1.5"),
        ({"fork_layers": True}, TypeError, "whole number or .auto., got True"),
        ({"masking": "none"}, ValueError, "'zero', 'attention', got 'none'"),
        ({"alpha": 1.01}, ValueError, r"alpha must be in \[0, 1\], got 1.01"),
        ({"alpha": -0.1}, ValueError, r"alpha must be in \[0, 1\]"),
        ({"alpha": math.nan}, ValueError, r"alpha must be in \[0, 1\], got nan"),
        ({"alpha": "0.8"}, TypeError, r"alpha must be a number in \[0, 1\] or .auto., got .0.8."),
        ({"alpha": {"visual": 0.8}}, ValueError, r"exactly the keys \['visual', 'audio'\]"),
        ({"alpha": {"visual": 0.8, "audio": 2}}, ValueError, r"alpha\['audio'\] must be in"),
        ({"text_weight": math.inf}, ValueError, "text_weight must be in"),
        ({"mask_scale": 2}, ValueError, "mask_scale must be in"),
        ({"masking": "attention", "mask_scale": 0.5}, ValueError, "no meaning with masking='attention'"),
    ],
)
def test_illegal_settings(settings, error, says):
    with pytest.raises(error, match=says):
        FMDConfig(**settings)


def test_fork_layers_beyond_the_decoder():
    with pytest.raises(ValueError, match="fork_layers=5 is out of range: the decoder has 4 layers"):
        FMDConfig(fork_layers=5).resolve(FMDConfig(), num_layers=4)


def test_unknown_override_names_the_settings():
    with pytest.raises(TypeError, match="unknown FMD setting 'layers'; the settings are fork_layers, masking"):
        FMDConfig().replace(layers=3)


def test_a_file_gives_the_settings_back(tmp_path):
    path = tmp_path / "fmd.json"
    for config in (
        FMDConfig(fork_layers=3, alpha={"visual": 0.75, "audio": 1}, masking="zero", mask_scale=0.25),
        FMDConfig(fork_layers="auto", alpha="auto"),
    ):
        config.to_file(path, measured={"samples": 100})
        assert FMDConfig.from_file(path) == config
        assert json.loads(path.read_text())["measured"] == {"samples": 100}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is no JSON"),
        ("[]", "holds no settings"),
        ('{"alpha": 0.8}', "holds no settings"),
        ('{"fork_merge_decoding": {"depth": 3}}', r"fmd.json: unknown FMD setting 'depth'"),
        ('{"fork_merge_decoding": {"alpha": 3}}', r"fmd.json: alpha must be in \[0, 1\], got 3"),
    ],
)
def test_files_that_hold_no_settings(tmp_path, content, says):
    (tmp_path / "fmd.json").write_text(content)
    with pytest.raises(ValueError, match=says):
        FMDConfig.from_file(tmp_path / "fmd.json")

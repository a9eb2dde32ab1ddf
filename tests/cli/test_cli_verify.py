"""`fmd-ext verify`: equal where it is, different where something is broken on purpose."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import BitsAndBytesConfig, Qwen2_5OmniThinkerForConditionalGeneration

from fmd_ext import ops
from fmd_ext.adapters import find_adapter
from fmd_ext.cli import main, verify
from fmd_ext.cli.models import load_model
from fmd_ext.lab.tiny import save_random_model, tiny_processor, write_clip

QUICK = ["--max-frame-pixels", "3136", "--max-new-tokens", "3"]


def verdicts(out):
    return [word for line in out.splitlines() for word in ("equal", "DIFFERENT") if word in line and "│" in line]


def test_the_built_in_model_equals_two_plain_passes(capsys):
    assert main(["verify", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "fusion norms: on in" in out and "fusion qkv: off: it pays little on cpu" in out
    assert verdicts(out) == ["equal", "equal"] and "zero" in out and "attention" in out


def test_a_folder_in_bfloat16_with_a_clip_of_its_own(tmp_path, capsys):
    pytest.importorskip("accelerate")
    save_random_model(tmp_path / "model", family="qwen3_omni")
    clip = write_clip(tmp_path / "clip.mp4", seconds=1.0)
    options = ["--dtype", "bfloat16", "--fork-layers", "3", "--interleaved", "--device", "spread", *QUICK]
    assert main(["verify", str(clip), "--model", str(tmp_path / "model"), *options]) == 0
    out = capsys.readouterr().out
    assert verdicts(out) == ["equal", "equal"] and "3 of 4" in out and "bfloat16" in out


def test_a_broken_operator_is_found(monkeypatch, capsys):
    monkeypatch.setattr(ops, "merge_", lambda *arguments: None)
    assert main(["verify", *QUICK]) == 1
    assert verdicts(capsys.readouterr().out) == ["DIFFERENT", "DIFFERENT"]


def test_nothing_to_verify_is_refused(tmp_path, capsys):
    clip = write_clip(tmp_path / "silent.mp4", seconds=1.0, sound=False)
    assert main(["verify", str(clip)]) == main(["verify", "--fork-layers", "0"]) == 2
    said = capsys.readouterr().err
    assert "has no audio: nothing would be forked" in said and "is the untouched model" in said


class TestEightBits:
    """Activations quantised together: what a row gives depends on which others share its call."""

    @pytest.fixture
    def one_scale_per_call(self, monkeypatch):
        """The text decoder's linears with int8 weights and activations, as torch's dynamic quantisation has them."""

        class Dynamic(torch.nn.Linear):
            def forward(self, rows):
                scale, weight_scale = rows.abs().amax() / 127, self.weight.abs().amax(1, keepdim=True) / 127
                weight = (self.weight / weight_scale).round() * weight_scale
                return torch.nn.functional.linear((rows / scale).round() * scale, weight, self.bias)

        def load(*arguments):
            loaded = load_model(*arguments)
            for part in find_adapter(loaded.model).find_decoder(loaded.model).layers.modules():
                if type(part) is torch.nn.Linear:
                    part.__class__ = Dynamic
            return loaded

        monkeypatch.setattr(verify, "load_model", load)

    def test_a_model_is_judged_by_its_own_spread(self, one_scale_per_call, capsys):
        assert main(["verify", *QUICK]) == 0
        out = capsys.readouterr().out
        assert verdicts(out) == ["equal", "equal"]
        spread = float(re.search(r"itself differs by (\S+) when the prompt shares a batch", out)[1])
        allowed = float(re.search(r"error at most (\S+),", out)[1])
        assert spread > 1e-3 and allowed == pytest.approx(2 * spread, rel=0.1)

    def test_a_broken_operator_is_found_all_the_same(self, one_scale_per_call, monkeypatch, capsys):
        monkeypatch.setattr(ops, "merge_", lambda *arguments: None)
        assert main(["verify", *QUICK]) == 1
        assert verdicts(capsys.readouterr().out) == ["DIFFERENT", "DIFFERENT"]

    def test_a_folder_of_bitsandbytes(self, tmp_path, capsys):
        pytest.importorskip("bitsandbytes")
        save_random_model(tmp_path / "model")
        config = BitsAndBytesConfig(load_in_8bit=True)
        model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
            tmp_path / "model", quantization_config=config
        )
        model.save_pretrained(tmp_path / "eight_bits")
        tiny_processor().save_pretrained(tmp_path / "eight_bits")
        assert main(["verify", "--model", str(tmp_path / "eight_bits"), *QUICK]) == 0
        assert verdicts(capsys.readouterr().out) == ["equal", "equal"]


def test_rows_that_depend_on_nothing_else_get_no_more_room(capsys):
    assert main(["verify", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "error at most 0.0001," in out and "itself differs" not in out

"""`fmd-ext verify`: equal where it is, different where something is broken on purpose."""

from __future__ import annotations

import pytest

from fmd_ext import ops
from fmd_ext.cli import main
from fmd_ext.lab.tiny import save_random_model, write_clip

QUICK = ["--max-frame-pixels", "3136", "--max-new-tokens", "3"]


def verdicts(out):
    return [word for line in out.splitlines() for word in ("equal", "DIFFERENT") if word in line and "│" in line]


def test_the_built_in_model_equals_two_plain_passes(capsys):
    assert main(["verify", *QUICK]) == 0
    out = capsys.readouterr().out
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

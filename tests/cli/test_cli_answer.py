"""What is said of a clip and of an answer, and what of logits that make none."""

from __future__ import annotations

import ast
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from fmd_ext.cli import answer
from fmd_ext.cli.errors import UserError
from fmd_ext.lab.tiny import write_clip
from fmd_ext.lab.trained import bundled_scenes
from paths import ROOT

QUICK = ["--max-new-tokens", "6", "--max-frame-pixels", "3136"]


def test_what_is_shown_of_a_clip_is_told(fmd, folder, tmp_path):
    options = ["--model", folder / "model", *QUICK]
    long = write_clip(tmp_path / "long.mp4", seconds=9.0, width=16, height=16)
    code, _, err = fmd("ask", long, "What?", "--max-frames", "4", *options)
    assert code == 0 and "note: the clip gives 4 frames, 0.44 per second; 9.0 s of sound" in err
    err = fmd("ask", folder / "silent.mp4", "What?", *options)[2]
    assert "note: the clip gives 2 frames, 2 per second\n" in err


def test_an_answer_that_is_cut_off_is_noted(fmd, folder):
    clip = next(iter(bundled_scenes()))
    assert (
        "cut off at 2 tokens: --max-new-tokens takes more"
        in fmd("ask", clip, "Describe what you see and hear.", "--max-new-tokens", "2")[2]
    )
    assert "cut off" not in fmd("ask", clip, "Describe what you see and hear.")[2]


def test_answers_begin_without_a_blank(capsys):
    """The streamed one and the whole one; a tokenizer may put a blank before the first word."""

    class Blanks:
        def decode(self, ids, **options):
            return "".join(f"  {int(index)}" for index in ids)

    clock = answer._Clock(Blanks(), sys.stdout)
    for token in ([7], [1], [2]):
        clock.put(torch.tensor(token))
    clock.end()
    assert capsys.readouterr().out == "1  2\n"


def test_logits_that_are_not_finite_name_bfloat16(fmd, folder, tmp_path):
    """A model whose numbers are beyond float16, by a large weight in front of the logits."""
    shutil.copytree(folder / "model", tmp_path / "large")
    weights = load_file(tmp_path / "large" / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.3.mlp.down_proj.weight"))
    weights[name] *= 1e6
    save_file(weights, tmp_path / "large" / "model.safetensors", metadata={"format": "pt"})
    for command in (("ask", folder / "clip.mp4", "What?"), ("verify",)):
        code, out, err = fmd(*command, "--model", tmp_path / "large", "--dtype", "float16", *QUICK)
        assert code == 2 and out == ""
        assert err.splitlines()[-1].endswith(
            "logits in float16 are not finite; its numbers go beyond what float16 holds: try --dtype bfloat16"
        )
        assert fmd(*command, "--model", tmp_path / "large", "--dtype", "bfloat16", *QUICK)[0] == 0


def test_logits_that_are_not_finite_at_a_later_token_are_found():
    finite = answer.FiniteLogits(torch.bfloat16)
    forbidden = torch.tensor([[0.0, -torch.inf]])
    assert finite(None, forbidden) is forbidden
    finite.check()
    finite(None, torch.tensor([[0.0, torch.nan]]))
    with pytest.raises(UserError, match="logits in bfloat16 are not finite; its weights, or what its encoders make"):
        finite.check()
    with pytest.raises(UserError, match="float16"):
        answer.FiniteLogits(torch.float16)(None, torch.tensor([[0.0, torch.inf]]))


def test_progress_bars_appear_on_a_terminal_only(fmd, folder):
    assert "Loading weights" not in fmd("ask", folder / "clip.mp4", "What?", "--model", folder / "model", *QUICK)[2]


def test_every_progress_bar_asks_for_a_terminal():
    """tqdm draws in pipes and logs too unless ``disable`` is None."""
    without = []
    for path in (ROOT / "fmd_ext").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "tqdm":
                given = [ast.unparse(word.value) for word in call.keywords if word.arg == "disable"]
                without += [] if given and "None" in given[0] else [f"{path.name}:{call.lineno}"]
    assert without == []

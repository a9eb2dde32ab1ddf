"""``fmd-ext diagnose``, called in this process."""

from __future__ import annotations

import json

import pytest

from fmd_ext.cli import main
from fmd_ext.lab.tiny import save_random_model, write_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnose")
    write_clip(folder / "clip.mp4", seconds=1.0)
    write_clip(folder / "silent.mp4", seconds=1.0, sound=False)
    save_random_model(folder / "model", seed=1)
    return folder


def quick(folder):
    return ["--model", str(folder / "model"), "--max-new-tokens", "4", "--max-frame-pixels", "3136"]


def test_attention_answers_and_the_prompts_own_choice(folder, capsys):
    facts, plots = folder / "facts.json", folder / "plots"
    arguments = ["--fork-layers", "2", "--json", str(facts), "--plots", str(plots), *quick(folder)]
    assert main(["diagnose", str(folder / "clip.mp4"), "What?", *arguments]) == 0
    out, err = capsys.readouterr()
    assert "weights are random" in err and "attention of the last question token" in out
    found = json.loads(facts.read_text())
    said = "changes" if found["flips"] else "stays the same"
    assert f"the answer {said}" in out
    branches = [(layer["layer"], layer["branch"]) for layer in found["attention"]["fork-merge"]]
    assert branches == [
        (0, "visual"),
        (0, "audio"),
        (1, "visual"),
        (1, "audio"),
        *((layer, "all") for layer in range(2, 4)),
    ]
    for layers in found["attention"].values():
        assert all(abs(layer["visual"] + layer["audio"] + layer["text"] - 1) < 1e-5 for layer in layers)
    shares = found["fork_shares"]
    own, other = (sum(layer[branch][0] for layer in shares[:2]) for branch in (0, 1))
    assert f"alpha=auto at 2 layers is visual {(1 + own / (own + other)) / 2:.2f}" in out
    assert (plots / "attention_per_layer.png").read_bytes().startswith(b"\x89PNG")


def test_a_clip_without_sound_has_nothing_to_choose(folder, capsys):
    assert main(["diagnose", str(folder / "silent.mp4"), "What?", "--fork-layers", "auto", *quick(folder)]) == 0
    out, err = capsys.readouterr()
    assert "has no audio, so nothing is forked" in err
    assert "the answer stays the same" in out and "own attention" not in out


def test_the_model_that_comes_with_the_package(folder, capsys):
    """With its own settings; where a branch has no masked positions there is no alpha to choose."""
    assert main(["diagnose", str(folder / "clip.mp4"), "Is the dog making sound?", "--masking", "attention"]) == 0
    out, err = capsys.readouterr()
    assert "weights are random" not in err and "masking attention" in out and "own attention" not in out
    assert main(["diagnose", str(folder / "clip.mp4"), "Is the dog making sound?", "--masking", "zero"]) == 0
    assert "by this prompt's own attention: fork_layers=auto is" in capsys.readouterr().out

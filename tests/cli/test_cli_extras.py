"""What a command needs, and by which model it answers, is said before anything is imported or read."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from fmd_ext.torchvision_mend import torchvision_advice


@pytest.mark.parametrize("command", ["ask", "diagnose", "verify"])
def test_the_first_line_says_that_the_toy_model_answers(fmd, command):
    """Whatever comes after it; with a model named there is no such line."""
    question = ["nothing.mp4"] if command == "verify" else ["nothing.mp4", "What?"]
    code, _, err = fmd(command, *question)
    assert code == 2 and err.splitlines()[0].startswith("note: the built-in toy model answers, trained on synthetic")
    assert "toy" not in fmd(command, *question, "--model", "./nowhere")[2]


@pytest.mark.parametrize(
    "arguments, module, remedy",
    [
        (("ask", "a.mp4", "What?"), "torchvision", torchvision_advice()),
        (("demo",), "torchvision", torchvision_advice()),
        (("diagnose", "a.mp4", "What?", "--plots", "out"), "matplotlib", "pip install 'fmd-ext[plots]'"),
        (("eval", "--benchmark", "avqa", "--data", "."), "scipy", "pip install 'fmd-ext[eval]'"),
        (("eval", "--score-only", "--output", "out"), "scipy", "pip install 'fmd-ext[eval]'"),
        (("calibrate", "--benchmark", "avqa", "--data", "."), "scipy", "pip install 'fmd-ext[eval]'"),
        (("compare", "results.json"), "scipy", "pip install 'fmd-ext[eval]'"),
        (("curves", "out"), "matplotlib", "pip install 'fmd-ext[plots]'"),
        (("curves", "out"), "scipy", "pip install 'fmd-ext[eval]'"),
    ],
)
def test_a_missing_extra_is_named_before_anything_is_imported(fmd, monkeypatch, arguments, module, remedy):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else found(name))
    monkeypatch.setattr(importlib, "import_module", None)
    code, out, err = fmd(*arguments)
    error = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert code == 2 and out == "" and len(error) == 1
    assert f"needs {module}, which is not installed: {remedy}" in error[0]


def test_benchmarks_are_listed_without_scipy():
    """In a process of its own: here it is imported already."""
    program = (
        "import sys; sys.modules['scipy'] = None\nfrom fmd_ext.cli import main; sys.exit(main(['eval', '--list']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "avhbench" in done.stdout and done.stderr == ""

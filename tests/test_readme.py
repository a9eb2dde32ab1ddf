"""What the README promises: its example runs, its commands and links exist, its figures are those on record."""

from __future__ import annotations

import os
import re
import shlex

import huggingface_hub
import pytest

import fmd_ext
from fmd_ext.cli.main import _parser, main
from fmd_ext.lab.tiny import save_random_model, write_clip
from paths import ROOT

README = (ROOT / "README.md").read_text()
GENERATED = ("evidence.md", "performance.md")  # pages of scripts, whose headings follow the data
MOST_WORDS = 6000  # of prose in docs/
MOST_WORDS_OF_README = 480
MOST_WORDS_OF_KERNELS = 1400


def test_the_ten_line_example_runs(tmp_path, capsys):
    """With a small random model in place of the 7B one and a clip made here."""
    code = re.search(r"```python\n(import fmd_ext.*?)```", README, re.S).group(1)
    assert len(code.strip().splitlines()) <= 12
    save_random_model(tmp_path / "model", seed=0)
    write_clip(tmp_path / "clip.mp4", seed=0)
    code = code.replace("Qwen/Qwen2.5-Omni-7B", str(tmp_path / "model")).replace("clip.mp4", str(tmp_path / "clip.mp4"))
    names: dict[str, object] = {}
    exec(compile(code.replace("fork_layers=7", "fork_layers=1"), "README.md", "exec"), names)
    assert fmd_ext.handle_of(names["model"]).last_call.plan.forked.all()
    assert "Is the dog barking?" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["scripts/demo", "scripts/test"])
def test_commands_exist(command):
    assert command in README and os.access(ROOT / command, os.X_OK)


@pytest.mark.parametrize("page", ["README.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", text):
        if target.startswith("https://"):
            continue
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), target
        if anchor and file.name not in GENERATED:
            assert anchor in anchors(file.read_text()), f"{target}#{anchor}"


def anchors(text):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_prose_stays_short():
    """Half of what it once was. Tables and code are not counted.

    The kernels' design note, for those who write kernels, came later and has a bound of its own.
    """
    words = {path.name: len(prose(path.read_text()).split()) for path in (ROOT / "docs").glob("*.md")}
    assert words.pop("kernels.md") <= MOST_WORDS_OF_KERNELS
    assert len(words) > 8 and min(words.values()) > 100, words
    assert sum(words.values()) <= MOST_WORDS, words
    assert len(prose(README).split()) <= MOST_WORDS_OF_README


def prose(text):
    """A page without comments, code blocks and tables."""
    text = re.sub(r"(?s)<!--.*?-->", "", text)
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", text)
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("|"))


def test_prose_is_what_stands_outside_tables_and_code():
    assert prose("a b\n```sh\nc d\n```\n| e | f |\n<!-- g\nh -->i").split() == ["a", "b", "i"]


def documented_commands():
    """Every line of ``fmd-ext`` in the shell blocks of README and docs, without its comment."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [block for page in pages for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return list(dict.fromkeys(line.strip() for line in lines if line.startswith("fmd-ext ")))


def test_documented_commands_are_understood():
    assert len(documented_commands()) > 5
    for command in documented_commands():
        arguments = shlex.split(command, comments=True)[1:]
        try:
            _, more = _parser().parse_known_args(arguments)
            assert not more or arguments[0] == "serve", command  # which hands them on to vLLM
        except SystemExit as exit_:
            assert exit_.code == 0, command


def test_the_commands_of_the_readme_run(tmp_path, monkeypatch, capsys):
    """Beside a clip, without a network: each works, or says in one line why it cannot."""
    write_clip(tmp_path / "clip.mp4", seconds=1.0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    commands = [command for command in documented_commands() if command in README]
    assert {shlex.split(command)[1] for command in commands} >= {"ask", "verify", "diagnose", "eval", "doctor"}
    for command in commands:
        arguments = shlex.split(command, comments=True)[1:]
        try:
            code = main(arguments)
        except SystemExit as exit_:  # --help
            code = exit_.code
        out, err = capsys.readouterr()
        if "--model" in arguments:
            assert code == 2 and out == "" and len(err.splitlines()) == 1 and "hub cannot be reached" in err, command
        else:
            assert code == 0 and out, (command, err)

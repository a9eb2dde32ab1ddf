"""Clips and models in a folder, and a command line called in this process."""

from __future__ import annotations

import pytest

from fmd_ext.cli import main
from fmd_ext.lab.tiny import save_random_model, write_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """clip.mp4, silent.mp4 and blind.mp4; model: a saved thinker; full: a saved model with talker."""
    folder = tmp_path_factory.mktemp("cli")
    write_clip(folder / "clip.mp4", seconds=1.0)
    write_clip(folder / "silent.mp4", seconds=1.0, sound=False)
    write_clip(folder / "blind.mp4", seconds=1.0, picture=False)
    save_random_model(folder / "model", seed=1)
    save_random_model(folder / "full", seed=1, speech=True)
    return folder


@pytest.fixture
def fmd(capsys):
    """Runs a command line; gives exit code, stdout and stderr."""

    def run(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:  # argparse's own way out
            code = exit_.code
        out, err = capsys.readouterr()
        return code, out, err

    return run

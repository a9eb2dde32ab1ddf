"""The command line, called in this process."""

from __future__ import annotations

import pytest

from fmd_ext.cli import main


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

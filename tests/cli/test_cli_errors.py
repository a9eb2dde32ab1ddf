"""How warnings and errors are told: one line each, and not one for each of a thousand clips."""

from __future__ import annotations

import logging
import warnings

import pytest

from fmd_ext.cli.errors import UserError, blaming_input, notes_from_log, notes_from_warnings


def test_of_many_alike_a_few_are_told(capsys):
    with notes_from_warnings():
        for clip in range(900):
            warnings.warn(f"clip {clip} is long", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        warnings.warn("not for users", DeprecationWarning, stacklevel=1)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        *(f"note: clip {clip} is long" for clip in range(3)),
        "note: 897 more like this",
        "note: something else",
    ]


def test_what_was_noted_before_an_error_is_told_too(capsys):
    with pytest.raises(UserError, match="^wrong$"), blaming_input(ValueError), notes_from_warnings():
        warnings.warn("before it", stacklevel=1)
        raise ValueError("wrong\nand a page of what a library thinks of it")
    assert capsys.readouterr().err == "note: before it\n"


def test_other_errors_are_nobodys_input():
    with pytest.raises(KeyError), blaming_input(ValueError):
        raise KeyError
    with pytest.raises(UserError, match="model x: ValueError"), blaming_input(ValueError, prefix="model x: "):
        raise ValueError


def test_of_many_alike_in_the_log_a_few_are_told(capsys):
    logger = logging.getLogger("fmd_ext.inputs.media")
    with notes_from_log():
        for clip in range(10):
            logger.warning("clip %d is damaged", clip)
        logger.warning("something else")
    assert capsys.readouterr().err.splitlines() == [
        *(f"note: clip {clip} is damaged" for clip in range(3)),
        "note: something else",
        "note: 7 more like those above",
    ]

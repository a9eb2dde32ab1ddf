"""Errors that are the user's to mend, told in one line."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator


class UserError(Exception):
    """Wrong input. The message is one line: what was given, and what is accepted."""


@contextlib.contextmanager
def blaming_input(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Within this context the given kinds of errors are about the user's input, not about our code."""
    try:
        yield
    except kinds as error:
        # The first line says it: some libraries go on for pages.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(prefix + lines[0]) from error


@contextlib.contextmanager
def notes_from_log() -> Iterator[None]:
    """Within this context what our own code logs as a warning is one line on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("note: %(message)s"))
    logger = logging.getLogger("fmd_ext")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def notes_from_warnings() -> Iterator[None]:
    """Within this context a warning is one line on stderr, without the place in our code that it comes from."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        warnings.simplefilter("ignore", DeprecationWarning)  # for those who write libraries, not for those who use them
        yield
    for warning in caught:
        print(f"note: {warning.message}", file=sys.stderr)

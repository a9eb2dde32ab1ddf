"""Errors that are the user's to mend, told in one line."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator

MOST_ALIKE = 3  # notes from one place in the code


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
    """A warning within this context is one line on stderr at its end, without the place in our code that it comes from.

    Of those that come from one place, such as one for each clip of a benchmark, the first few are told, and how many
    more there were.
    """
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            warnings.simplefilter("ignore", DeprecationWarning)  # for those who write libraries, not their users
            yield
    finally:
        places: dict[tuple[str, int], list[str]] = {}
        for warning in caught:
            places.setdefault((warning.filename, warning.lineno), []).append(str(warning.message))
        for messages in places.values():
            more = [f"{len(messages) - MOST_ALIKE} more like this"] * (len(messages) > MOST_ALIKE)
            for message in [*messages[:MOST_ALIKE], *more]:
                print(f"note: {message}", file=sys.stderr)

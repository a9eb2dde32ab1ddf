"""Errors that are the user's to mend, told in one line."""

from __future__ import annotations

import collections
import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

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


def check_target(path: str | Path | None) -> None:
    """Raises UserError for a file that cannot be written where it shall be, before the work whose results it gets."""
    if path is not None:
        if Path(path).is_dir():
            raise UserError(f"{path} is a folder, not a file to write")
        if not Path(path).absolute().parent.is_dir():
            raise UserError(f"{path}: there is no folder {Path(path).parent} to write it in")


def check_folder(path: str | Path | None) -> None:
    """Raises UserError where a folder to write files in cannot be made, since there is a file of that name."""
    if path is not None and Path(path).is_file():
        raise UserError(f"{path} is a file, not a folder to write in")


@contextlib.contextmanager
def notes_from_log() -> Iterator[None]:
    """Within this context what our own code logs as a warning is one line on stderr."""
    handler = _Notes(sys.stderr)
    handler.setFormatter(logging.Formatter("note: %(message)s"))
    logger = logging.getLogger("fmd_ext")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.tell_the_rest()


class _Notes(logging.StreamHandler):
    """Of those that come from one place, such as one for each clip of a benchmark, tells the first few."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.counts: collections.Counter[tuple[str, int]] = collections.Counter()

    def emit(self, record: logging.LogRecord) -> None:
        place = record.pathname, record.lineno
        self.counts[place] += 1
        if self.counts[place] <= MOST_ALIKE:
            super().emit(record)

    def tell_the_rest(self) -> None:
        for count in self.counts.values():
            if count > MOST_ALIKE:
                self.stream.write(f"note: {count - MOST_ALIKE} more like those above\n")


@contextlib.contextmanager
def notes_from_warnings(tell: bool = True) -> Iterator[None]:
    """A warning within this context is one line on stderr at its end, without the place in our code that it comes from.

    Of those that come from one place, such as one for each clip of a benchmark, the first few are told, and how many
    more there were. ``tell``: False for a call whose warnings were told before.
    """
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            warnings.simplefilter("ignore", DeprecationWarning)  # for those who write libraries, not their users
            yield
    finally:
        places: dict[tuple[str, int], list[str]] = {}
        for warning in caught if tell else ():
            places.setdefault((warning.filename, warning.lineno), []).append(str(warning.message))
        for messages in places.values():
            more = [f"{len(messages) - MOST_ALIKE} more like this"] * (len(messages) > MOST_ALIKE)
            for message in [*messages[:MOST_ALIKE], *more]:
                print(f"note: {message}", file=sys.stderr)

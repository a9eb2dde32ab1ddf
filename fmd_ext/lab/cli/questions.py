"""The questions of a command: a benchmark's, as chosen, with what is missing or malformed told before a model loads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fmd_ext.cli.errors import UserError, blaming_input
from fmd_ext.lab.eval.benchmarks import DataError, Loaded, load, select
from fmd_ext.lab.eval.items import Item


def load_questions(args: argparse.Namespace) -> Loaded:
    """The benchmark that the command line names."""
    with blaming_input(DataError, ValueError, OSError):
        return load(args.benchmark, args.data, prompt=args.prompt, questions=args.questions)


def choose(args: argparse.Namespace, items: Sequence[Item]) -> list[Item]:
    """Those that the command line chooses."""
    with blaming_input(ValueError, OSError):
        return select(
            items, limit=args.limit, ids=ids_of(args.item), categories=args.category, exclude=ids_of(args.exclude)
        )


def ids_of(arguments: Sequence[str]) -> list[str]:
    """Ids of questions; ``@FILE`` stands for those in a file, one a line. Raises OSError for one that is missing."""
    ids: list[str] = []
    for argument in arguments:
        lines = Path(argument[1:]).read_text(encoding="utf-8").splitlines() if argument.startswith("@") else [argument]
        ids += [line.strip() for line in lines if line.strip()]
    return ids


def usable(args: argparse.Namespace, loaded: Loaded, items: Sequence[Item]) -> list[Item]:
    """The items whose video is there.

    Raises UserError where records cannot be used or videos are missing, unless ``--allow-malformed`` and
    ``--allow-missing`` say that this is known.
    """
    if loaded.malformed and not args.allow_malformed:
        raise UserError(
            f"{len(loaded.malformed)} records are not as published, the first: {loaded.malformed[0]}; --check lists "
            "them, --allow-malformed leaves them out"
        )
    there = [item for item in items if item.path is not None]
    if len(there) < len(items) and not args.allow_missing:
        lacking = sorted({item.video for item in items if item.path is None})
        raise UserError(
            f"{len(lacking)} videos are missing, among them {lacking[0]}: --check lists them, --allow-missing leaves "
            "their questions out"
        )
    if not there:
        raise UserError("none of the chosen questions has a video")
    return there

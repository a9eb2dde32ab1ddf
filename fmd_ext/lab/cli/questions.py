"""The questions of a command: a benchmark's, as chosen, with what is missing or malformed told before a model loads."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmd_ext.cli import show
from fmd_ext.cli.errors import UserError, blaming_input
from fmd_ext.lab.eval.benchmarks import DataError, Loaded, load, select
from fmd_ext.lab.eval.items import Item


def load_questions(args: argparse.Namespace) -> Loaded:
    """The benchmark that the command line names."""
    with blaming_input(DataError, ValueError, OSError):
        return load(args.benchmark, args.data, prompt=args.prompt, questions=args.questions)


def choose(args: argparse.Namespace, loaded: Loaded) -> tuple[list[Item], dict[str, Any]]:
    """The items that the command line chooses, and what `held_out` records of the others.

    A limit counts what is left when the calibration's videos are left out.
    """
    with blaming_input(ValueError, OSError):
        named = select(loaded.items, ids=ids_of(args.item), categories=args.category, exclude=ids_of(args.exclude))
        items, calibration = held_out(args, loaded, named)
        return select(items, limit=args.limit), calibration


def ids_of(arguments: Sequence[str]) -> list[str]:
    """Ids of questions; ``@FILE`` stands for those in a file, one a line. Raises OSError for one that is missing."""
    ids: list[str] = []
    for argument in arguments:
        lines = Path(argument[1:]).read_text(encoding="utf-8").splitlines() if argument.startswith("@") else [argument]
        ids += [line.strip() for line in lines if line.strip()]
    return ids


def held_out(args: argparse.Namespace, loaded: Loaded, items: Sequence[Item]) -> tuple[list[Item], dict[str, Any]]:
    """The items without those about videos that ``--config`` was calibrated on, and a record of them.

    The record is empty where there are none. With ``--keep-calibration-videos`` they are kept, and the record says so.
    Raises UserError where nothing else is left.
    """
    videos = _calibration_videos(args.config, loaded)
    seen = [item for item in items if item.video in videos]
    if not seen:
        return list(items), {}
    kept = args.keep_calibration_videos
    record = {"file": str(args.config), "videos": len({item.video for item in seen}), "kept": kept}
    told = f"{len(seen)} questions about {record['videos']} videos that {args.config} was calibrated on"
    if kept:
        show.note(f"{told} are asked: their accuracy says less than it seems to")
        return list(items), record | {"questions": [item.id for item in seen]}
    left = [item for item in items if item.video not in videos]
    if not left:
        raise UserError(f"all that is asked are {told}; --keep-calibration-videos asks them, and says so in the report")
    show.note(f"{told} are left out (--keep-calibration-videos asks them)")
    return left, record | {"questions": [item.id for item in seen]}


def _calibration_videos(config: str | None, loaded: Loaded) -> set[str]:
    """Names of the benchmark's videos in the record of ``fmd-ext calibrate``; none where there is no record."""
    if config is None:
        return set()
    with blaming_input(OSError, ValueError):
        content = json.loads(Path(config).read_text(encoding="utf-8"))
    record = content.get("calibration") if isinstance(content, dict) else None
    if not isinstance(record, dict) or record.get("benchmark") != loaded.benchmark.name:
        return set()
    named = {video for videos in record.get("videos", {}).values() for video in videos}
    ids = {*record.get("measured_on", ()), *record.get("validated_on", ())}
    return named | {item.video for item in loaded.items if item.id in ids}


def refuse_malformed(args: argparse.Namespace, loaded: Loaded) -> None:
    """Raises UserError where records cannot be used, unless ``--allow-malformed`` says that this is known."""
    if loaded.malformed and not args.allow_malformed:
        raise UserError(
            f"{len(loaded.malformed)} records are not as published, the first: {loaded.malformed[0]}; --check lists "
            "them, --allow-malformed leaves them out"
        )


def usable(args: argparse.Namespace, loaded: Loaded, items: Sequence[Item]) -> list[Item]:
    """The items whose video is there.

    Raises UserError where records cannot be used or videos are missing, unless ``--allow-malformed`` and
    ``--allow-missing`` say that this is known.
    """
    refuse_malformed(args, loaded)
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

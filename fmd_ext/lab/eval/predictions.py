"""Predictions on disk: one JSON object per line, appended and synced, so that a killed run loses at most one batch.

A results folder holds ``run.json`` and ``methods.json`` (all that decides the predictions), ``items.json`` (the
questions with their answers, so that scoring needs neither model nor data), ``selection.json`` (which of them were
asked), and ``shares/`` with one file per process. A share is a file: whoever holds its lock works on it, and all files
together are the predictions, whatever number of processes wrote them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fmd_ext.lab.eval.items import Item

Key = tuple[str, str, int]  # method, item, sample


# Settings that came later, and what held before they were recorded.
DEFAULTS = {"decode_split": "auto"}


class ResultsError(ValueError):
    """A results folder that cannot be used; the message says what is wrong with it and what to do."""


class Locked(ResultsError):
    """Another process is at work on the file."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a method said about an item.

    Args:
        method: name of the `methods.Choice`.
        item: id of the item.
        sample: number of the repetition under sampling; 0 with greedy decoding.
        prompt: what the model was asked.
        raw: what it said; None where there is an error.
        parsed: the answer in it, None where it is not clearly an answer.
        score: 1 right, 0 wrong or unparsed; None for a caption or an error.
        tokens: that it generated, the end of the turn included.
        first_token_s: seconds from the call to the first token, of the whole batch.
        seconds: of the whole batch.
        batch: items in the batch.
        error: why there is no answer, such as a file that cannot be read.
        shown: what the model got of the clip: ``frames``, ``picture_s`` and ``sound_s`` (seconds).
        notes: what was lost on the way, kind to detail; the kinds are in `fmd_ext.lab.eval.clips`. And what a baseline
            says of the prompt, such as that it does not act there.
    """

    method: str
    item: str
    sample: int
    prompt: str
    raw: str | None
    parsed: str | None = None
    score: float | None = None
    tokens: int = 0
    first_token_s: float = 0.0
    seconds: float = 0.0
    batch: int = 1
    error: str | None = None
    shown: Mapping[str, float] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> Key:
        return (self.method, self.item, self.sample)


class Share:
    """One file of predictions, held exclusively and only ever appended to. Use as a context manager.

    With ``wait`` it waits for another process that holds it, otherwise that raises Locked.
    """

    def __init__(self, path: Path, *, wait: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise Locked(f"another process is at work on {path}") from None
        # A process that was killed while writing leaves half a line: it goes, and its items are done again.
        content = path.read_bytes()
        os.ftruncate(self._file, content.rfind(b"\n") + 1)

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Writes the predictions and returns when they are on the disk. An OSError names the file."""
        lines = [json.dumps(dataclasses.asdict(p), ensure_ascii=False) + "\n" for p in predictions]
        data = "".join(lines).encode()
        with _naming(self.path):
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)  # the lock goes with it

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Results:
    """A results folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def share_path(self, index: int, count: int) -> Path:
        return self.folder / "shares" / f"{index}-of-{count}.jsonl"

    def begin(
        self,
        settings: Mapping[str, Any],
        items: Iterable[Item],
        methods: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Records what decides the predictions, or checks that it is what the folder's predictions were made with.

        Args:
            settings: of the run; ``settings["about"]`` (versions, the machine) is recorded but not compared.
            items: the benchmark's.
            methods: all settings in force of each method, defaults included.

        A folder without predictions, as a run leaves it that failed at its first question, is begun anew. Raises
        ResultsError naming what differs.
        """
        with self.at_work(settings, items, methods):
            pass

    @contextlib.contextmanager
    def at_work(
        self,
        settings: Mapping[str, Any],
        items: Iterable[Item],
        methods: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Iterator[None]:
        """`begin`, and within this context nobody else can change what was recorded.

        Several processes can be at work with the same settings. One with others is refused, and leaves the folder's
        files as they are.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps(settings))  # as it will be read
        methods = json.loads(json.dumps(methods or {}))
        file = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._record(settings, items, methods)
            # Shared with the other processes at work. Changing the lock takes two steps, and somebody may record in
            # between; so what was recorded is compared once more.
            fcntl.flock(file, fcntl.LOCK_SH)
            self._compare(settings, methods)
            yield
        finally:
            os.close(file)  # the lock goes with it

    def _record(self, settings: dict[str, Any], items: Iterable[Item], methods: dict[str, Any]) -> None:
        """With nobody else at work: writes what is new, and what no prediction was made with yet."""
        answered = {key[0] for key in self.predictions()}
        path = self.folder / "run.json"
        if answered and path.exists():
            self._compare(settings, {name: values for name, values in methods.items() if name in answered})
        if not (answered and path.exists()):
            rows = [_written(item) for item in items]
            write_atomically(self.folder / "items.json", json.dumps(rows, ensure_ascii=False))
            write_atomically(path, json.dumps(settings, indent=2))
        recorded = self.methods() | methods
        write_atomically(self.folder / "methods.json", json.dumps(recorded, indent=2))

    def _compare(self, settings: dict[str, Any], methods: dict[str, Any]) -> None:
        """Raises ResultsError where something recorded differs."""
        before = self.settings()
        for name in sorted((before.keys() | settings.keys()) - {"about"}):
            held, asked = (record.get(name, DEFAULTS.get(name)) for record in (before, settings))
            if held != asked:
                raise ResultsError(
                    f"{self.folder} holds predictions with {name}={held!r}, this run has {asked!r}: "
                    "choose another folder, or the same settings"
                )
        recorded = self.methods()
        for name, values in methods.items():
            if recorded.get(name, values) != values:
                raise ResultsError(
                    f"{self.folder} holds predictions of {name} with {recorded[name]}, now it means {values}: choose "
                    "another folder, or name the settings"
                )

    def record_selection(
        self, asked: Sequence[Item], excluded: Iterable[str] = (), calibration: Mapping[str, Any] | None = None
    ) -> None:
        """Adds to the questions that are asked in this folder; those ``excluded`` (ids) are asked no longer.

        ``calibration``: of questions about videos that settings were chosen on their ids as ``questions``, and whether
        they are ``kept``.
        """
        calibration = dict(calibration or {})
        left_out = {*excluded, *(() if calibration.get("kept") else calibration.get("questions", ()))}
        ids = ((self.asked() or set()) | {item.id for item in asked}) - left_out
        selection = {
            "asked": [item.id for item in self.items() if item.id in ids],
            "excluded": sorted(excluded),
            "calibration": calibration,
        }
        write_atomically(self.folder / "selection.json", json.dumps(selection, ensure_ascii=False))

    def asked(self) -> set[str] | None:
        """Ids of the questions that are asked; None where nobody recorded them."""
        return set(self._json("selection.json")["asked"]) if (self.folder / "selection.json").exists() else None

    def left_out(self) -> tuple[list[str], dict[str, Any]]:
        """Ids of the questions that were excluded by hand, and what `record_selection` was told about calibration."""
        if not (self.folder / "selection.json").exists():
            return [], {}
        selection = self._json("selection.json")
        return selection["excluded"], selection["calibration"]

    def settings(self) -> dict[str, Any]:
        return self._json("run.json")

    def methods(self) -> dict[str, dict[str, Any]]:
        """Method to its settings in force; empty where none were recorded."""
        return self._json("methods.json") if (self.folder / "methods.json").exists() else {}

    def items(self) -> list[Item]:
        """The benchmark's items as they were when the run began."""
        rows = self._json("items.json")
        return [_item(row) for row in rows]

    def predictions(self) -> dict[Key, Prediction]:
        """All predictions of all shares. Of an item that was done twice the first counts; an answer replaces an error.

        Raises ResultsError for a line that is none, unless it is the last of its file and was cut off.
        """
        found: dict[Key, Prediction] = {}
        for path in sorted((self.folder / "shares").glob("*.jsonl")):
            lines = path.read_bytes().split(b"\n")
            for number, line in enumerate(lines[:-1], 1):  # what follows the last line end was cut off
                try:
                    prediction = Prediction(**json.loads(line))
                except (ValueError, TypeError) as error:
                    raise ResultsError(f"{path}, line {number} is no prediction: {error}") from error
                known = found.get(prediction.key)
                if known is None or known.error is not None:
                    found[prediction.key] = prediction
        return found

    def readings(self, protocol: str) -> Mapping[Key, str | None]:
        """What ``protocol`` reads in the predictions, where that is known without their text; here of none."""
        return {}

    def refuse_others(self, count: int) -> None:
        """Raises Locked when processes of a run with another number of shares than ``count`` are at work here."""
        for path in (self.folder / "shares").glob("*.jsonl"):
            if path.stem.endswith(f"-of-{count}"):
                continue
            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise Locked(f"processes of another run are at work on {path}; wait for them or end them") from None

    def _json(self, name: str) -> Any:
        path = self.folder / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ResultsError(f"{self.folder} is no results folder: it has no {name}") from None
        except json.JSONDecodeError as error:
            raise ResultsError(f"{path} is damaged: {error}") from error


def write_atomically(path: Path, text: str) -> None:
    """Puts a file in its place whole, replacing what is there; a file that holds this text already is left alone.

    An OSError names the file, also where the disk is full, and leaves nothing behind.
    """
    data = text.encode()
    if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _naming(path):
            part.write_bytes(data)
            os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An OSError within this context names the file: that of a full disk comes without a name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _written(item: Item) -> dict[str, Any]:
    """As JSON holds it."""
    paths = {name: str(path) if (path := getattr(item, name)) else None for name in ("path", "sound")}
    return dataclasses.asdict(item) | paths


def _item(row: Mapping[str, Any]) -> Item:
    """From what `_written` gives; records of earlier versions have no ``sound``."""
    paths = {name: Path(row[name]) if row.get(name) else None for name in ("path", "sound")}
    return Item(**{**row, **paths, "options": tuple(row["options"])})

"""What the benchmarks share: finding the published files, checking them, and putting the question to the model."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fmd_ext.lab.eval.benchmarks.official import Official
from fmd_ext.lab.eval.items import Item

KEY = "(key)"  # under which a record of a file that holds them by name keeps its name
MEDIA = frozenset({".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".flv"})
SOUND = frozenset({".wav", ".mp3", ".flac", ".m4a", ".ogg", ".aac"})


class DataError(ValueError):
    """A benchmark's files are not there or not as published; the message says what is wrong and what is expected."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """How a question is put. ``{question}``, ``{options}`` (one per line, "A. ..."), ``{inline_options}`` (the same in
    one line), ``{option_list}`` (the same as Python writes a list) and ``{subtitles}`` are filled in. ``source`` says
    where the wording comes from."""

    template: str
    source: str


PLAIN = Prompt("{question} {inline_options}", "ours: the question, then the choices, and nothing else")
LETTER = Prompt(
    "{question}\n{options}\nAnswer with the option's letter from the given choices directly.",
    "LLaVA-1.5's wording for multiple choice, common in evaluations of video models",
)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A published set of questions.

    Args:
        name, title: for the command line and for people.
        source: where the files come from.
        files: where the questions may lie within the data folder, the first that is there is taken; a pattern stands
            for all that match.
        read: from the records of those files to items, reporting to a `Findings`.
        prompts: by name, the first is the default. Captions are asked as published.
        published: known numbers of items by version, to compare with what is found.
        published_groups: known numbers of items by category and value; groups that are absent altogether are not.
        official: how its own script reads answers; None where it has none that reads text.
        tables: categories by which results are shown.
        group_averages: categories of which the mean over groups is reported, too.
        max_new_tokens: by kind of item.
        notes: what a reader of the results must know.
    """

    name: str
    title: str
    source: str
    files: tuple[str, ...]
    read: Callable[[list[Any], Findings], list[Item]]
    prompts: Mapping[str, Prompt]
    published: Mapping[str, int]
    tables: tuple[str, ...]
    group_averages: tuple[str, ...] = ()
    max_new_tokens: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"yes-no": 16, "choice": 16, "word": 16, "caption": 128}
    )
    notes: str = ""
    published_groups: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    official: Official | None = None


class Findings:
    """The data folder, and what is wrong with it: collected, so that all of it can be told at once.

    Attributes:
        malformed: one line per record that cannot be used.
        missing: names of videos and sound files that are asked about and not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.malformed: list[str] = []
        self.missing: dict[str, None] = {}
        self._by_name: dict[str, list[Path]] = collections.defaultdict(list)
        for path in _files_below(folder):
            if path.suffix.lower() in MEDIA | SOUND and path.is_file():
                self._by_name[path.stem].append(path)

    def video(self, name: str) -> Path | None:
        """The media file of a video, by its name without suffix or its path below the data folder."""
        return self._find([name], {"video": MEDIA})

    def sound(self, *names: str) -> Path | None:
        """The sound file of the first of ``names`` that has one, else the video file, whose own sound it is."""
        return self._find(names, {"sound": SOUND, "video": MEDIA})

    def _find(self, names: Sequence[str], kinds: Mapping[str, frozenset[str]]) -> Path | None:
        """The first file, by kind and then by name; notes the first name as missing where there is none."""
        for kind, suffixes in kinds.items():
            for name in names:
                found = self._called(name, suffixes)
                if len(found) > 1:
                    self.malformed.append(f"{kind} {name} is there {len(found)} times: {found[0]}, {found[1]}")
                if found:
                    return found[0]
        self.missing[names[0]] = None
        return None

    def _called(self, name: str, suffixes: frozenset[str]) -> list[Path]:
        stem = Path(name).stem if Path(name).suffix.lower() in MEDIA | SOUND else Path(name).name
        found = [path for path in self._by_name.get(stem, []) if path.suffix.lower() in suffixes]
        if "/" not in name:
            return found
        parts = (*Path(name.lstrip("/")).parts[:-1], stem)
        return [path for path in found if (*path.parts[:-1], path.stem)[-len(parts) :] == parts]

    def fields(self, record: Any, names: Sequence[str], where: str) -> list[Any] | None:
        """The named fields of a record; None, and a line in ``malformed``, where one is missing."""
        if not isinstance(record, Mapping):
            self.malformed.append(f"{where} is {json.dumps(record)[:60]}, not an object with {', '.join(names)}")
            return None
        lacking = [name for name in names if record.get(name) is None]
        if lacking:
            self.malformed.append(f"{where} lacks {', '.join(lacking)} (it has {', '.join(map(str, record))})")
            return None
        return [record[name] for name in names]

    def subtitles(self, *places: str) -> str:
        """The spoken text of an .srt file below the data folder, one line per subtitle; empty where there is none."""
        for place in places:
            path = self.folder / place
            if path.is_file():
                return _spoken(path.read_text(encoding="utf-8", errors="replace"))
        return ""


def _files_below(folder: Path, around: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Files in the folder and below it, also behind links: videos often lie on another disk.

    ``around``: the folders it lies in, so that a link to one of them is not followed forever.
    """
    own = folder.resolve()
    if own in around:
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _files_below(path, (*around, own))
        else:
            yield path


def read_records(folder: Path, patterns: Iterable[str], given: Path | None = None) -> tuple[list[Any], list[Path]]:
    """The records of the first pattern that matches below ``folder``, or of the file ``given``; and the files read.

    JSON lists, JSON objects that hold the records by name (which each keeps under `KEY`), JSON lines and parquet are
    read. A record that is no object is left to the benchmark to refuse. Raises DataError for files that are missing or
    of another form.
    """
    patterns = list(patterns)
    paths = [given] if given else next((found for p in patterns if (found := sorted(folder.glob(p)))), [])
    if not paths or not all(path.is_file() for path in paths):
        looked = given or f"{folder}: {', '.join(patterns)}"
        raise DataError(f"no file with questions: looked for {looked}")
    return [record for path in paths for record in _records_of(path)], paths


def _records_of(path: Path) -> list[Any]:
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise DataError(f"{path} needs pyarrow to be read: pip install pyarrow") from error
        return parquet.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".jsonl":
        return [_json(line, f"{path}, line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    records = _json(text, str(path))
    if isinstance(records, dict) and records and all(isinstance(record, dict) for record in records.values()):
        records = [{KEY: name, **record} for name, record in records.items()]
    if not isinstance(records, list):
        raise DataError(f"{path} must hold a list of records, got {type(records).__name__}")
    return records


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is no JSON: {error}") from error


def options_of(value: Any) -> tuple[str, ...] | None:
    """Choices without their letters ("A. a dog" is "a dog"); None for what is no list of two or more texts."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return None
    if (
        not isinstance(value, (list, tuple))
        or len(value) < 2
        or not all(isinstance(text, (str, int, float)) and not isinstance(text, bool) for text in value)
    ):
        return None
    texts = [str(text).strip() for text in value]
    marked = [text[:2] in (f"{letter}.", f"{letter})") for letter, text in zip("ABCDEFGHIJ", texts, strict=False)]
    return tuple(text[2:].strip() for text in texts) if all(marked) else tuple(texts)


def choice_of(choices: Any, answer: Any) -> tuple[tuple[str, ...], str] | None:
    """Choices without their letters, and the letter of the right one; None where these do not fit."""
    options, letter = options_of(choices), str(answer).strip().upper()
    if options is None or letter not in [chr(ord("A") + i) for i in range(len(options))]:
        return None
    return options, letter


def ask(item: Item, template: str) -> str:
    """The prompt of an item. Raises KeyError for a placeholder that is none of `Prompt`'s."""
    if item.kind == "caption":
        return item.question
    lettered = [f"{chr(ord('A') + i)}. {text}" for i, text in enumerate(item.options)] if item.kind == "choice" else []
    return template.format(
        question=item.question,
        options="\n".join(lettered),
        inline_options=" ".join(lettered),
        option_list=str(lettered),
        subtitles=item.subtitles or "No subtitles available.",
    ).strip()


def _spoken(text: str) -> str:
    """Of an .srt file: without numbers, times and markup."""
    lines = []
    for block in text.replace("\r\n", "\n").split("\n\n"):
        words = [line for line in block.strip().splitlines() if "-->" not in line and not line.strip().isdigit()]
        words = ["".join(piece.split(">")[-1] for piece in line.split("<")) for line in words]
        if spoken := " ".join(word.strip() for word in words if word.strip()):
            lines.append(spoken)
    return "\n".join(lines)

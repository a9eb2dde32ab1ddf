"""``results.json``: a run's answers and how they came about, in one file to send to others, who print the same tables.

It holds no question, no text of an answer and no path of the machine: the questions of some benchmarks may not be
passed on. Of each answer it keeps what every reading finds in it. docs/evaluation.md lists the fields.
"""

from __future__ import annotations

import collections
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from fmd_ext.lab.eval.benchmarks import BENCHMARKS, Benchmark
from fmd_ext.lab.eval.counts import asked_items
from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.predictions import Key, Prediction, Results, ResultsError, write_atomically
from fmd_ext.lab.eval.run import judged
from fmd_ext.lab.eval.scores import PROTOCOLS, reading_of
from fmd_ext.lab.eval.speed import read_speed

NAME, SCHEMA, VERSION = "results.json", "fmd_ext results", 1
PARTS = ("run", "methods", "left_out", "questions", "answers", "speed")
_OF_A_QUESTION = ("id", "kind", "answer", "cluster", "categories")
_OF_AN_ANSWER = ("method", "item", "sample", "read", "correct", "error", "tokens", "first_token_s", "seconds", "batch")
_COMPARED = ("prompt", "decoding", "generation", "max_new_tokens", "reading", "dtype", "batch_size")


def write_results(results: Results) -> Path:
    """Writes the file into the results folder and returns its path. Captions are left out: scoring reads their text."""
    path = results.folder / NAME
    content = {name: value for name, value in _content(results).items()}
    head = {"schema": SCHEMA, "version": VERSION, "sha256": _checksum(content)}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    for name, value in content.items():
        if isinstance(value, list):  # a line each, so that a difference between two files can be read
            rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in value)
            lines.append(f" {json.dumps(name)}: [\n{rows}\n ]")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}")
    write_atomically(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return path


def _content(results: Results) -> dict[str, Any]:
    run, predictions = results.settings(), results.predictions()
    benchmark = BENCHMARKS[run["benchmark"]]
    items = {item.id: item for item in asked_items(results, predictions) if item.kind != "caption"}
    clusters = {video: number for number, video in enumerate(dict.fromkeys(item.video for item in items.values()))}
    excluded, calibration = results.left_out()
    content = {
        "run": run,
        "methods": results.methods(),
        "left_out": {"excluded": excluded, "calibration": calibration},
        "questions": [_question(item, clusters[item.video], benchmark) for item in items.values()],
        "answers": [
            _answer(prediction, items[prediction.item], benchmark)
            for prediction in sorted(predictions.values(), key=lambda p: p.key)
            if prediction.item in items
        ],
        "speed": read_speed(results),
    }
    return _without_paths(json.loads(json.dumps(content)))


def _question(item: Item, cluster: int, benchmark: Benchmark) -> dict[str, Any]:
    """What the tables need; ``cluster``: the number of its video."""
    shown = dict.fromkeys((*benchmark.tables, *benchmark.group_averages))
    categories = {name: list(item.values(name)) for name in shown if name in item.categories}
    values = (item.id, item.kind, item.answer, cluster, categories)
    return dict(zip(_OF_A_QUESTION, values, strict=True))


def _answer(prediction: Prediction, item: Item, benchmark: Benchmark) -> dict[str, Any]:
    read, correct = {}, {}
    for protocol in PROTOCOLS[: 1 if benchmark.official is None else None]:
        if prediction.error is None:
            parsed, score = judged(item, prediction.raw, reading_of(benchmark, protocol)[0])
            read[protocol], correct[protocol] = parsed, int(score)
    row = {name: getattr(prediction, name) for name in _OF_AN_ANSWER if name not in ("read", "correct")}
    row |= {"read": read, "correct": correct, "first_token_s": round(prediction.first_token_s, 4)}
    if prediction.error is not None:  # libraries put the names of files into their messages
        row["error"] = re.sub(r"\S*[/\\]\S*", "…", prediction.error)
    return row | {"seconds": round(prediction.seconds, 4), "notes": sorted(prediction.notes)}


def _without_paths(value: Any) -> Any:
    """Of every path of this machine its last name alone; a hub's ``owner/name`` stays."""
    if isinstance(value, dict):
        return {name: _without_paths(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    if not isinstance(value, str) or not re.match(r"([./\\~]|[A-Za-z]:[/\\])", value) or "\n" in value:
        return value
    kinds = (PurePosixPath, PureWindowsPath) if "\\" in value else (PurePosixPath,)
    return kinds[-1](value).name or value


class ResultsFiles(Results):
    """One or more files of `write_results`, for `scores.evaluate`. The methods of several have their file's name behind
    them; all must be about the same questions.

    Attributes:
        contents: path to the file's content.
        differ: names of settings that the files do not share.

    Raises:
        ResultsError: a file that is none, of another version, changed since it was written, or about other questions.
        OSError: a file that cannot be read.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        super().__init__(Path(paths[0]))
        doubled = [path for path, count in collections.Counter(map(str, paths)).items() if count > 1]
        if doubled:
            raise ResultsError(f"{doubled[0]} is given twice")
        self.contents = {str(path): _checked(path) for path in paths}
        self._first = next(iter(self.contents.values()))
        runs = {path: content["run"] for path, content in self.contents.items()}
        for path, run in runs.items():
            first = self._first["run"]
            if (run["benchmark"], run["questions"]) != (first["benchmark"], first["questions"]):
                raise ResultsError(
                    f"{path} is not about the questions of {paths[0]}: {_about(run)}, not {_about(first)}"
                )
        spelled = [[json.dumps(run.get(name), sort_keys=True) for run in runs.values()] for name in _COMPARED]
        self.differ = [name for name, values in zip(_COMPARED, spelled, strict=True) if len(set(values)) > 1]

    def settings(self) -> dict[str, Any]:
        return self._first["run"]

    def methods(self) -> dict[str, dict[str, Any]]:
        return {
            self._name(path, m): s for path, content in self.contents.items() for m, s in content["methods"].items()
        }

    def items(self) -> list[Item]:
        """Without their questions and options; ``video`` is the number of the cluster."""
        rows = {row["id"]: row for content in reversed(self.contents.values()) for row in content["questions"]}
        return [
            Item(row["id"], str(row["cluster"]), None, "", row["kind"], row["answer"], categories=row["categories"])
            for row in rows.values()
        ]

    def asked(self) -> set[str] | None:
        return {row["id"] for content in self.contents.values() for row in content["questions"]}

    def left_out(self) -> tuple[list[str], dict[str, Any]]:
        return self._first["left_out"]["excluded"], self._first["left_out"]["calibration"]

    def predictions(self) -> dict[Key, Prediction]:
        return {key: prediction for key, (prediction, _) in self._answers().items()}

    def readings(self, protocol: str) -> Mapping[Key, str | None]:
        """As they were read where the file was written: the texts are not here."""
        return {key: read[protocol] for key, (_, read) in self._answers().items() if protocol in read}

    def _answers(self) -> dict[Key, tuple[Prediction, dict[str, str | None]]]:
        found = {}
        for path, content in self.contents.items():
            for row in content["answers"]:
                raw = None if row["error"] is not None else ""
                times = {name: row[name] for name in ("tokens", "first_token_s", "seconds", "batch", "error")}
                notes = dict.fromkeys(row["notes"], "")
                method = self._name(path, row["method"])
                prediction = Prediction(method, row["item"], row["sample"], "", raw, notes=notes, **times)
                found[prediction.key] = prediction, row["read"]
        return found

    def _name(self, path: str, method: str) -> str:
        return method if len(self.contents) == 1 else f"{method} [{path}]"


def _about(run: Mapping[str, Any]) -> str:
    return f"{run['benchmark']}, questions {run['questions'][:12]}"


def _checked(path: str | Path) -> dict[str, Any]:
    """The content of a file, its parts there and its answers as they were written."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultsError(f"{path} is damaged, or no results file: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ResultsError(f'{path} is no results file: its "schema" must be "{SCHEMA}"; fmd-ext eval writes {NAME}')
    if content.get("version") != VERSION:
        raise ResultsError(f"{path} has version {content.get('version')!r}; this fmd_ext reads version {VERSION}")
    if lacking := [name for name in PARTS if name not in content]:
        raise ResultsError(f"{path} is damaged: it lacks {', '.join(lacking)}")
    parts = {name: content[name] for name in PARTS}
    if _checksum(parts) != content.get("sha256"):
        raise ResultsError(f"{path} is damaged: it has changed since it was written, its checksum does not fit")
    if parts["run"]["benchmark"] not in BENCHMARKS:
        raise ResultsError(
            f"{path} is about {parts['run']['benchmark']!r}, a benchmark that this fmd_ext does not know"
        )
    right = {row["id"]: row["answer"] for row in parts["questions"]}
    for row in parts["answers"]:
        if any(correct != (row["read"][name] == right[row["item"]]) for name, correct in row["correct"].items()):
            raise ResultsError(f"{path} contradicts itself: {row['method']} about {row['item']} is marked wrongly")
    return parts


def _checksum(parts: Mapping[str, Any]) -> str:
    """SHA-256 of the parts in one spelling: keys sorted, no space."""
    spelled = json.dumps({name: parts[name] for name in PARTS}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(spelled.encode()).hexdigest()


def fingerprint(model: Any) -> str | None:
    """SHA-256 of every parameter's name, shape, dtype and first 16 values: which weights answered, wherever they lay.

    None for parameters that give no values, such as those of layers that are loaded when they run.
    """
    digest = hashlib.sha256()
    try:
        for name, parameter in model.named_parameters():
            digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
            digest.update(parameter.detach().reshape(-1)[:16].float().cpu().numpy().tobytes())
    except (RuntimeError, NotImplementedError, TypeError):
        return None
    return digest.hexdigest()

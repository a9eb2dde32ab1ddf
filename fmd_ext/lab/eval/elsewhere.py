"""Predictions made elsewhere, as JSON lines of id and answer, scored beside our own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fmd_ext.lab.eval.benchmarks import DataError, Loaded
from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.parsing import judged
from fmd_ext.lab.eval.predictions import Prediction, Results, ResultsError, write_atomically


def read_answers(path: str | Path, items: Sequence[Item]) -> dict[str, str]:
    """Item id to answer, from a file of JSON lines: ``{"id": ..., "answer": ...}``; other fields are ignored.

    Raises DataError naming the line that is no such object, has an id that no item has or one for the second time.
    """
    known, answers = {item.id for item in items}, {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where} is no JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("answer"), str) or "id" not in row:
            raise DataError(f'{where} must be {{"id": ..., "answer": "..."}}, got {line.strip()[:80]}')
        identity = str(row["id"])
        if identity not in known:
            raise DataError(f"{where}: no question has the id {identity!r}; --check --export FOLDER writes the ids")
        if identity in answers:
            raise DataError(f"{where}: the id {identity!r} is there for the second time")
        answers[identity] = row["answer"]
    if not answers:
        raise DataError(f"{path} holds no answers")
    return answers


def take_in(
    results: Results, loaded: Loaded, items: Sequence[Item], answers: dict[str, dict[str, str]], source: dict[str, str]
) -> None:
    """Puts answers into a results folder, a method each; a folder of a run with the same questions is added to.

    Args:
        items: that are asked; those without an answer count as not asked yet.
        answers: method to item id to text.
        source: method to the file, for the record.

    Raises ResultsError for a folder of other questions, and for a method that has answered here already, otherwise.
    """
    if (results.folder / "run.json").exists():
        before = results.settings()
        if (before["benchmark"], before["questions"]) != (loaded.benchmark.name, loaded.digest):
            raise ResultsError(f"{results.folder} holds answers to other questions: choose another folder")
    else:
        settings: dict[str, Any] = {"benchmark": loaded.benchmark.name, "questions": loaded.digest}
        excluded = {"malformed": len(loaded.malformed), "missing_videos": 0}
        results.begin(settings | {"model": "answers made elsewhere", "about": {"excluded": excluded}}, loaded.items)
    results.record_selection(items)
    own = {prediction.method for prediction in _predictions_of_runs(results)}
    for method, texts in answers.items():
        if method in own:
            raise ResultsError(f"{results.folder} holds answers of its own by {method}: give these another name")
        rows = [
            Prediction(method, item.id, 0, item.prompt, texts[item.id], *judged(item, texts[item.id]))
            for item in items
            if item.id in texts
        ]
        lines = [json.dumps(vars(row), ensure_ascii=False) + "\n" for row in rows]
        path = _path(results, method)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, "".join(lines))
    recorded = results.methods() | {method: {"made_elsewhere": source[method]} for method in answers}
    write_atomically(results.folder / "methods.json", json.dumps(recorded, indent=2))


def _path(results: Results, method: str) -> Path:
    digest = hashlib.sha256(method.encode()).hexdigest()[:8]  # names that differ in their signs alone
    return results.folder / "shares" / f"elsewhere-{re.sub(r'[^-.0-9A-Za-z]+', '-', method)}-{digest}.jsonl"


def _predictions_of_runs(results: Results) -> list[Prediction]:
    elsewhere = {name for name, settings in results.methods().items() if "made_elsewhere" in settings}
    return [prediction for prediction in results.predictions().values() if prediction.method not in elsewhere]

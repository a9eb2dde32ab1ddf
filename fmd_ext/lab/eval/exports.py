"""Files for others: questions to be answered elsewhere, answers for official scorers and judge models, tables."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fmd_ext.lab.eval.benchmarks import BENCHMARKS, Loaded
from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.predictions import Results, write_atomically
from fmd_ext.lab.eval.scores import Evaluation
from fmd_ext.lab.eval.tables import Cell, Table
from fmd_ext.lab.eval.wording import how_read, short_names


def export_questions(loaded: Loaded, items: Sequence[Item], folder: str | Path) -> Path:
    """``questions.jsonl``: id, video, path and prompt of each item, for whoever answers them elsewhere."""
    rows = [
        {"id": item.id, "video": item.video, "path": str(item.path) if item.path else None, "prompt": item.prompt}
        for item in items
    ]
    return _write(Path(folder) / "questions.jsonl", _lines(rows))


def export(results: Results, evaluation: Evaluation, folder: str | Path) -> list[Path]:
    """Writes all files below ``folder`` and returns their paths.

    Per method ``answers-*.jsonl`` (id and answer, as `elsewhere` reads them), ``official-*.json`` (as the benchmark's
    own script takes them, or its records with a ``response``) and ``judge-*.jsonl`` (one request per answer, in the
    form of chat services); of all methods ``tables.csv`` and ``tables.tex`` (needs LaTeX's booktabs).
    CMM's own script reads a record per line, so its ``official-*.json`` holds lines.
    """
    folder, items, predictions = Path(folder), {item.id: item for item in results.items()}, results.predictions()
    paths = []
    for method, name in short_names(evaluation.methods).items():
        said = [(items[p.item], p.raw) for p in predictions.values() if p.method == method and p.error is None]
        first = list({item.id: (item, raw) for item, raw in reversed(said)}.values())[::-1]  # of several samples
        stem = re.sub(r"[^-.\w]+", "-", name)
        if folder / f"answers-{stem}.jsonl" in paths:  # names that differ in their signs alone
            stem += f"-{len(paths)}"
        answers = [{"id": item.id, "video": item.video, "reference": item.answer, "answer": raw} for item, raw in first]
        paths.append(_write(folder / f"answers-{stem}.jsonl", _lines(answers)))
        records = OFFICIAL[evaluation.settings["benchmark"]](first)
        by_line = evaluation.settings["benchmark"] in READ_BY_LINE
        text = _lines(records) if by_line else json.dumps(records, ensure_ascii=False, indent=1)
        paths.append(_write(folder / f"official-{stem}.json", text))
        requests = [{"custom_id": item.id, "messages": [_judged_by(item, raw)]} for item, raw in first]
        paths.append(_write(folder / f"judge-{stem}.jsonl", _lines(requests)))
    paths.append(_write(folder / "tables.csv", as_csv(evaluation)))
    paths.append(_write(folder / "tables.tex", as_latex(evaluation)))
    return paths


def as_csv(evaluation: Evaluation) -> str:
    """A row per table, group and method; shares and differences from 0 to 1, empty where not defined."""
    text = io.StringIO()
    metrics = ("precision", "recall", "f1", "yes_rate")
    names = "table group method items videos accuracy low high difference difference_low difference_high p adjusted_p"
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names.split(), "unparsed", *metrics, "reading"])
    for table in evaluation.tables:
        for group, cells in table.rows.items():
            for method, cell in cells.items():
                accuracy, compared = cell.accuracy, cell.comparison
                gain = compared.difference if compared else None
                writer.writerow(
                    [table.category, group, method, accuracy.num_items, accuracy.num_clusters]
                    + [_number(value) for value in (accuracy.value, accuracy.low, accuracy.high)]
                    + [_number(value) for value in ((gain.value, gain.low, gain.high) if gain else (None,) * 3)]
                    + [_number(compared.p_value if compared else None), _number(cell.adjusted_p)]
                    + [_number(cell.unparsed)]
                    + [_number(cell.yes_no[name].value if cell.yes_no else None) for name in metrics]
                    + [evaluation.protocol]
                )
    return text.getvalue()


def as_latex(evaluation: Evaluation) -> str:
    """A tabular per table: groups in rows, methods in columns, accuracy in % with half the width of its interval."""
    read = how_read(BENCHMARKS[evaluation.settings["benchmark"]], evaluation.protocol)
    return "\n".join(_tabular(table, short_names(evaluation.methods), read) for table in evaluation.tables)


def _tabular(table: Table, names: dict[str, str], read: str) -> str:
    rows = [
        " & ".join([_tex(group), *(_accuracy(cells[method]) for method in names)]) + r" \\"
        for group, cells in table.rows.items()
    ]
    head = " & ".join([_tex(table.category), *map(_tex, names.values())]) + r" \\"
    note = "% accuracy in %, with half the width of its 95 % interval; a star: differs from the first, after Holm"
    opening, closing = rf"\begin{{tabular}}{{l{'r' * len(names)}}}", r"\end{tabular}"
    return "\n".join(
        [f"% reading: {read}", note, opening, r"\toprule", head, r"\midrule", *rows, r"\bottomrule", closing, ""]
    )


def _accuracy(cell: Cell) -> str:
    accuracy = cell.accuracy
    if accuracy.value != accuracy.value:
        return "--"
    star = "$^*$" if cell.adjusted_p is not None and cell.adjusted_p < 0.05 else ""
    return f"{100 * accuracy.value:.1f}{star} $\\pm$ {50 * (accuracy.high - accuracy.low):.1f}"


def _tex(text: str) -> str:
    greek = {"α": r"$\alpha$", "β": r"$\beta$"}
    text = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", "/")).replace("~", r"\textasciitilde{}")
    return re.sub("[αβ]", lambda match: greek[match[0]], text.replace("^", r"\textasciicircum{}"))


def _judged_by(item: Item, raw: str) -> dict[str, str]:
    """What a judge model is asked about one answer. The wording is ours."""
    if item.kind == "caption":
        task = 'Rate from 0 to 10 how far the description agrees with the reference. Reply with {"score": ...} only.'
        parts = [f"Reference: {item.answer}", f"Description: {raw}"]
    else:
        task = 'Does the reply give the right answer, and no other? Reply with {"correct": true} or {"correct": false}.'
        right = item.answer
        if item.kind == "choice":
            right += ". " + item.options[ord(item.answer) - ord("A")]
        options = [f"{chr(ord('A') + number)}. {text}" for number, text in enumerate(item.options)]
        shown = ["Options: " + " ".join(options)] if item.kind == "choice" else []
        parts = [f"Question: {item.question}", *shown, f"Right answer: {right}", f"Reply: {raw}"]
    return {"role": "user", "content": "\n".join([task, *parts])}


def _video_mme(said: Sequence[tuple[Item, str]]) -> list[dict[str, Any]]:
    """As the authors' eval_your_results.py takes it: a record per video with its questions."""
    videos: dict[str, dict[str, Any]] = {}
    for item, raw in said:
        about = {name: next(iter(item.values(name)), "") for name in ("duration", "domain", "sub-category", "task")}
        video = videos.setdefault(
            item.video,
            {
                "video_id": item.video,
                "duration": about["duration"],
                "domain": about["domain"],
                "sub_category": about["sub-category"],
                "questions": [],
            },
        )
        options = [f"{chr(ord('A') + number)}. {text}" for number, text in enumerate(item.options)]
        asked = {"question_id": item.id, "task_type": about["task"], "question": item.question, "options": options}
        video["questions"].append(asked | {"answer": item.answer, "response": raw})
    return list(videos.values())


def _records(
    fields: Callable[[Item], dict[str, Any]], response: str = "response"
) -> Callable[[Sequence[tuple[Item, str]]], list[dict[str, Any]]]:
    """``response``: the field of what the model said."""
    return lambda said: [fields(item) | {response: raw} for item, raw in said]


# By benchmark, in the names of fields that its published files use.
OFFICIAL: dict[str, Callable[[Sequence[tuple[Item, str]]], list[dict[str, Any]]]] = {
    "avhbench": _records(
        lambda item: {
            "video_id": item.video,
            "task": item.categories["task"],
            "text": item.question,
            "label": item.answer.capitalize() if item.kind == "yes-no" else item.answer,
        }
    ),
    "cmm": _records(
        lambda item: {
            "category": item.categories["category"],
            "sub_category": item.categories["sub-category"],
            "modality": item.categories["modality"],
            "granularity": item.categories["granularity"],
            "video_path": item.categories["video file"] or None,
            "audio_path": item.categories["sound file"] or None,
            "question": item.question,
            "answer": item.answer,
        },
        response="pred",
    ),
    "daily-omni": _records(
        lambda item: {
            "video_id": item.video,
            "Type": item.categories["type"],
            "video_category": item.categories["category"],
            "video_duration": item.categories["duration"],
            "Question": item.question,
            "Choice": [f"{chr(ord('A') + number)}. {text}" for number, text in enumerate(item.options)],
            "Answer": item.answer,
        }
    ),
    "music-avqa": _records(
        lambda item: {
            "video_id": item.video,
            "question_id": item.id.rpartition("/")[2],
            "type": json.dumps(str(item.categories["type"]).rsplit(" ", 1)),
            "question_content": item.question,
            "anser": item.answer,
        }
    ),
    "avqa": _records(
        lambda item: {
            "id": item.id,
            "video_name": item.video,
            "question_text": item.question,
            "multi_choice": list(item.options),
            "answer": ord(item.answer) - ord("A"),
        }
    ),
    "video-mme": _video_mme,
    "worldsense": _records(
        lambda item: {
            "index": item.id,
            "video_id": item.video,
            "question": item.question,
            "candidates": [f"{chr(ord('A') + number)}. {text}" for number, text in enumerate(item.options)],
            "answer": item.answer,
        }
    ),
}

READ_BY_LINE = {"cmm"}
OFFICIAL["avhbench-deduplicated"] = OFFICIAL["avhbench"]
OFFICIAL["daily-omni-picture"] = OFFICIAL["daily-omni-sound"] = OFFICIAL["daily-omni"]


def _number(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.6g}"


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    return path

"""WorldSense (arXiv 2502.04326): multiple choice about real-world videos that needs picture and sound."""

from __future__ import annotations

import re
from typing import Any

from fmd_ext.lab.eval.benchmarks import official
from fmd_ext.lab.eval.benchmarks.base import KEY, PLAIN, Benchmark, Findings, Prompt, choice_of
from fmd_ext.lab.eval.items import Item

TASK = re.compile(r"task\d+")
_WATCH = (
    "Carefully watch this video and pay attention to every detail. "
    "Based on your observations, select the best option that accurately addresses the question.\n"
    "These are the frames of a video{and_audio}.{subtitles} "
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option.\n{{question}}\n{{options}}"
)
_OFFICIAL = "the wording of the benchmark's public evaluation (its task in lmms-eval 0.7)"


def read(records: list[Any], findings: Findings) -> list[Item]:
    """The published form has a record per video, with ``task0``, ``task1``, ...; derivatives have one per question."""
    items: list[Item] = []
    for number, record in enumerate(records, 1):
        where = f"record {number}"
        tasks = (
            sorted((name for name in record if TASK.fullmatch(name)), key=lambda name: int(name[4:]))
            if isinstance(record, dict)
            else []
        )
        if tasks:
            video = next((str(record[name]) for name in ("video_id", "video", KEY) if record.get(name)), None)
            if video is None:
                findings.malformed.append(f"{where} has no video_id (it has {', '.join(map(str, record))})")
                continue
            for name in tasks:
                about = {**record, **(record[name] if isinstance(record[name], dict) else {}), "subtitle_path": None}
                item = _item(about, video, f"{video}/{name}", f"{where}, {name}", findings)
                items += [item] * (item is not None)
        elif (values := findings.fields(record, ("video_path",), where)) is not None:
            item = _item(record, str(values[0]).removeprefix("./"), str(record.get("index", number)), where, findings)
            items += [item] * (item is not None)
    return items


def _item(record: dict[str, Any], video: str, identity: str, where: str, findings: Findings) -> Item | None:
    values = findings.fields(record, ("question", "candidates", "answer"), where)
    if values is None:
        return None
    question, choices, answer = values
    choice = choice_of(choices, str(answer).strip().rstrip("."))
    if choice is None:
        findings.malformed.append(f"{where}: answer {answer!r} is no letter of the candidates {choices!r}")
        return None
    named = {"domain": "domain", "task domain": "task_domain", "task": "task_type"}
    given = str(record.get("subtitle_path") or "").removeprefix("./")
    return Item(
        id=identity,
        video=video,
        path=findings.video(video),
        question=str(question).strip(),
        kind="choice",
        answer=choice[1],
        options=choice[0],
        categories={name: str(record[field]) for name, field in named.items() if record.get(field) is not None}
        | {"audio": _listed(record.get("audio_class")), "duration": _span(record.get("duration"))},
        subtitles=findings.subtitles(given or f"subtitles/{video}.srt"),
    )


def _listed(value: Any) -> tuple[str, ...]:
    """Classes of sound: a question counts under each."""
    return tuple(sorted(map(str, value))) if isinstance(value, list) else (str(value or "unknown"),)


def _span(value: Any) -> str:
    """The published spans of minutes; seconds are sorted into them."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value or "unknown")
    bounds = ((60, "<1min"), (120, "1-2min"), (240, "2-4min"), (360, "4-6min"), (480, "6-8min"))
    return next((name for most, name in bounds if value < most), ">8min")


WORLDSENSE = Benchmark(
    name="worldsense",
    title="WorldSense",
    source="https://github.com/honglyhly/WorldSense (worldsense_qa.json; videos/, subtitles/)",
    files=(
        "worldsense_qa.json",
        "worldsense.json",
        "worldsense.jsonl",
        "test.json",
        "test.jsonl",
        "data/test-*.parquet",
        "test-*.parquet",
    ),
    read=read,
    prompts={
        "default": Prompt(_WATCH.format(and_audio=" and the corresponding audio", subtitles=""), _OFFICIAL),
        "subtitles": Prompt(
            _WATCH.format(and_audio="", subtitles=' This video\'s subtitles are listed below:\n"{subtitles}"\n'),
            _OFFICIAL,
        ),
        "plain": PLAIN,
    },
    published={"test": 3172},
    official=official.WORLDSENSE,
    tables=("domain", "task domain", "task", "audio", "duration"),
)

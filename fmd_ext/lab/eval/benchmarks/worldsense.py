"""WorldSense (arXiv 2502.04326): multiple choice about real-world videos that needs picture and sound."""

from __future__ import annotations

from typing import Any

from fmd_ext.lab.eval.benchmarks import official
from fmd_ext.lab.eval.benchmarks.base import PLAIN, Benchmark, Findings, Prompt, choice_of
from fmd_ext.lab.eval.items import Item

_WATCH = (
    "Carefully watch this video and pay attention to every detail. "
    "Based on your observations, select the best option that accurately addresses the question.\n"
    "These are the frames of a video{and_audio}.{subtitles} "
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option.\n{{question}}\n{{options}}"
)
_OFFICIAL = "the wording of the benchmark's public evaluation (its task in lmms-eval 0.7)"


def read(records: list[dict[str, Any]], findings: Findings) -> list[Item]:
    items: list[Item] = []
    for number, record in enumerate(records, 1):
        values = findings.fields(record, ("video_path", "question", "candidates", "answer"), f"record {number}")
        if values is None:
            continue
        video, question, choices, answer = values
        choice = choice_of(choices, str(answer).strip().rstrip("."))
        if choice is None:
            findings.malformed.append(f"record {number}: answer {answer!r} is no letter of the candidates {choices!r}")
            continue
        named = {"domain": "task_domain", "task": "task_type", "duration": "duration"}
        items.append(
            Item(
                id=str(record.get("index", number)),
                video=str(video),
                path=findings.video(str(video).removeprefix("./")),
                question=str(question).strip(),
                kind="choice",
                answer=choice[1],
                options=choice[0],
                categories={name: str(record[field]) for name, field in named.items() if record.get(field) is not None}
                | {"audio": _listed(record.get("audio_class"))},
                subtitles=findings.subtitles(
                    str(record.get("subtitle_path") or "").removeprefix("./") or "no subtitles"
                ),
            )
        )
    return items


def _listed(value: Any) -> str:
    return " and ".join(sorted(map(str, value))) if isinstance(value, list) else str(value or "unknown")


WORLDSENSE = Benchmark(
    name="worldsense",
    title="WorldSense",
    source="the WorldSense data set of honglyhly (test split; videos/, subtitles/)",
    files=("worldsense.json", "worldsense.jsonl", "test.json", "test.jsonl", "data/test-*.parquet", "test-*.parquet"),
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
    tables=("domain", "task", "audio", "duration"),
)

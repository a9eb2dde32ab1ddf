"""Video-MME (arXiv 2405.21075): multiple choice about short, medium and long videos."""

from __future__ import annotations

from typing import Any

from fmd_ext.lab.eval.benchmarks import official
from fmd_ext.lab.eval.benchmarks.base import PLAIN, Benchmark, Findings, Prompt, choice_of
from fmd_ext.lab.eval.items import Item

_SELECT = (
    "Select the best answer to the following multiple-choice question based on the video{and_subtitles}. "
    "Respond with only the letter (A, B, C, or D) of the correct option.\n"
    "{{question}}\n{{options}}\nThe best answer is:"
)
_OFFICIAL = "the authors' prompts, https://github.com/MME-Benchmarks/Video-MME"


def read(records: list[Any], findings: Findings) -> list[Item]:
    items: list[Item] = []
    for number, record in enumerate(records, 1):
        names = (
            "videoID",
            "question_id",
            "question",
            "options",
            "answer",
            "duration",
            "domain",
            "sub_category",
            "task_type",
        )
        values = findings.fields(record, names, f"record {number}")
        if values is None:
            continue
        video, identity, question, choices, answer, *categories = values
        choice = choice_of(choices, answer)
        if choice is None:
            findings.malformed.append(f"record {number}: answer {answer!r} is no letter of the options {choices!r}")
            continue
        items.append(
            Item(
                id=str(identity),
                video=str(video),
                path=findings.video(str(video)),
                question=str(question).strip(),
                kind="choice",
                answer=choice[1],
                options=choice[0],
                categories=dict(zip(("duration", "domain", "sub-category", "task"), map(str, categories), strict=True)),
                subtitles=findings.subtitles(f"subtitle/{video}.srt", f"subtitles/{video}.srt"),
            )
        )
    return items


VIDEO_MME = Benchmark(
    name="video-mme",
    title="Video-MME",
    source="https://github.com/MME-Benchmarks/Video-MME (the parquet file of the test split; data/, subtitle/)",
    files=("videomme/test-*.parquet", "test-*.parquet", "videomme.json", "video_mme.json", "test.json", "test.jsonl"),
    read=read,
    prompts={
        "default": Prompt(_SELECT.format(and_subtitles=""), _OFFICIAL),
        "subtitles": Prompt(
            "This video's subtitles are listed below:\n{subtitles}\n"
            + _SELECT.format(and_subtitles=" and the subtitles"),
            _OFFICIAL,
        ),
        "plain": PLAIN,
    },
    published={"test": 2700},
    official=official.VIDEO_MME,
    tables=("duration", "domain", "task", "sub-category"),
    notes="Two settings: --prompt default is without subtitles, --prompt subtitles with all of them.",
)

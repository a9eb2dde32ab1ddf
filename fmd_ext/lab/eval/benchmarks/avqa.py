"""AVQA (ACM Multimedia 2022): multiple choice about everyday sounds and what makes them."""

from __future__ import annotations

from typing import Any

from fmd_ext.lab.eval.benchmarks.base import LETTER, PLAIN, Benchmark, Findings, options_of
from fmd_ext.lab.eval.items import Item


def read(records: list[Any], findings: Findings) -> list[Item]:
    items: list[Item] = []
    for number, record in enumerate(records, 1):
        where = f"record {number}"
        # multi_choice is null in a few published records: they have no choices to ask about.
        values = findings.fields(record, ("question_text", "multi_choice", "answer", "video_name"), where)
        if values is None:
            continue
        question, choices, answer, video = values
        options = options_of(choices)
        if options is None:
            findings.malformed.append(f"{where} needs two or more choices, it has {choices!r}")
            continue
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(options):
            findings.malformed.append(f"{where}: answer must be an index below {len(options)}, got {answer!r}")
            continue
        items.append(
            Item(
                id=str(record.get("id", f"{video}/{number}")),
                video=str(video),
                path=findings.video(str(video)),
                question=str(question).strip(),
                kind="choice",
                answer=chr(ord("A") + answer),
                options=options,
                categories={"type": str(record.get("question_type", "other"))},
            )
        )
    return items


AVQA = Benchmark(
    name="avqa",
    title="AVQA",
    source="https://mn.cs.tsinghua.edu.cn/avqa (val_qa.json; the videos are VGGSound's)",
    files=("val_qa.json", "test_qa.json", "avqa.json"),
    read=read,
    prompts={"default": LETTER, "plain": PLAIN},
    published={},
    tables=("type",),
)

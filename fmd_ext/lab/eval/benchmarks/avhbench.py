"""AVHBench (arXiv 2410.18325): does the model hear what it only sees, and see what it only hears?"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from fmd_ext.lab.eval.benchmarks import official
from fmd_ext.lab.eval.benchmarks.base import PLAIN, Benchmark, DataError, Findings, Prompt
from fmd_ext.lab.eval.items import Item

CAPTIONING = "AV Captioning"
TASKS = ("Video-driven Audio Hallucination", "Audio-driven Video Hallucination", "AV Matching", CAPTIONING)


def read(records: list[Any], findings: Findings) -> list[Item]:
    """Records have no id: an item is the n-th of its task and video, in the order of the file.

    Raises DataError for a file that names its tasks otherwise, as the one in AVHBench's own repository does. Reading
    only the tasks with known names would score a part as if it were all.
    """
    unknown = collections.Counter(
        str(record["task"])
        for record in records
        if isinstance(record, dict) and record.get("task", CAPTIONING) not in TASKS
    )
    if sum(unknown.values()) > max(1, len(records) / 100):
        named = ", ".join(f"{task!r} ({count} records)" for task, count in unknown.most_common())
        raise DataError(
            f"its tasks are named {named}, not {', '.join(map(repr, TASKS))}: give the file that names them so, "
            "such as QA.json beside the code of AVCD"
        )
    items: list[Item] = []
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    for number, record in enumerate(records, 1):
        values = findings.fields(record, ("video_id", "task", "text", "label"), f"record {number}")
        if values is None:
            continue
        video, task, text, label = map(str, values)
        if task not in TASKS:
            findings.malformed.append(f"record {number} has the task {task!r}; known are {', '.join(TASKS)}")
            continue
        kind = "caption" if task == CAPTIONING else "yes-no"
        answer = label.strip() if kind == "caption" else label.strip().lower().rstrip(".")
        if kind == "yes-no" and answer not in ("yes", "no"):
            findings.malformed.append(f"record {number} ({task}) has the label {label!r}, not Yes or No")
            continue
        seen[video, task] += 1
        items.append(
            Item(
                id=f"{video}/{task}/{seen[video, task]}",
                video=video,
                path=findings.video(video),
                question=text.strip(),
                kind=kind,
                answer=answer,
                categories={"task": task},
            )
        )
    return items


def read_deduplicated(records: list[Any], findings: Findings) -> list[Item]:
    """Each question about a video once; none where two records give it different labels."""
    labels: dict[tuple[str, str, str], dict[str, None]] = {}
    items = read(records, findings)
    for item in items:
        labels.setdefault(_asked(item), {})[item.answer] = None
    kept = {_asked(item): item for item in reversed(items) if item.kind == "caption" or len(labels[_asked(item)]) == 1}
    first = {id(item) for item in kept.values()}
    return [item for item in items if id(item) in first]


def _asked(item: Item) -> tuple[str, str, str]:
    """A caption's references are not one question asked twice."""
    return item.video, item.question, item.id if item.kind == "caption" else str(item.categories["task"])


AVHBENCH = Benchmark(
    name="avhbench",
    title="AVHBench",
    source="https://github.com/kaist-ami/AVHBench (json/, video/)",
    files=("QA.json", "qa.json", "json/QA.json", "json/qa.json", "avhbench.json", "AVH_test.json", "json/*.json"),
    read=read,
    prompts={
        "default": Prompt(
            "{question} Answer yes or no.",
            "public inference code of AVCD (arXiv 2505.20862), by the laboratory of the FMD paper; AVHBench has none",
        ),
        "plain": PLAIN,
    },
    published={"all tasks": 6408, "the yes/no tasks": 5302},
    published_groups={"task": dict(zip(TASKS, (2290, 1136, 1876, 1106), strict=True))},
    official=official.AVHBENCH,
    tables=("task",),
    group_averages=("task",),
    notes="Real and swapped videos are separate clusters. Captions: METEOR and CIDEr; GAVIE needs a judge model.",
)

AVHBENCH_DEDUPLICATED = dataclasses.replace(
    AVHBENCH,
    name="avhbench-deduplicated",
    title="AVHBench, each question once",
    read=read_deduplicated,
    published={"all tasks": 6399, "the yes/no tasks": 5293},
    published_groups={},
    notes="Of the 7 yes/no questions that the file has twice, 5 are asked once; 2, with both labels, are left out. "
    + AVHBENCH.notes,
)

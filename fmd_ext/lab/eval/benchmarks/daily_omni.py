"""Daily-Omni (arXiv 2505.17862): multiple choice about everyday videos, with both senses or one of them."""

from __future__ import annotations

import functools
from typing import Any

from fmd_ext.lab.eval.benchmarks import official
from fmd_ext.lab.eval.benchmarks.base import LETTER, PLAIN, Benchmark, Findings, Prompt, choice_of
from fmd_ext.lab.eval.items import Item

_TITLES = {"both": "Daily-Omni", "picture": "Daily-Omni, picture only", "sound": "Daily-Omni, sound only"}
_NAMES = {"both": "daily-omni", "picture": "daily-omni-picture", "sound": "daily-omni-sound"}
_ASKING = (
    "Your task is to accurately answer multiple-choice questions based on the given {given}.\n"
    "Select the single most accurate answer from the given choices.\n"
    "Question: {{question}}\nChoices: {{option_list}}\n"
    "Your answer should be a capital letter representing your choice: A, B, C, or D. Don't generate any other text."
)
_AUTHORS = "the authors' scripts in test_model/; theirs for Qwen2.5-Omni puts it before the video, here it follows"
_TYPES = {
    "AV Event Alignment": 238,
    "Comparative": 131,
    "Context understanding": 193,
    "Event Sequence": 306,
    "Inference": 154,
    "Reasoning": 175,
}


def read(senses: str, records: list[Any], findings: Findings) -> list[Item]:
    """Records have no id: an item is the n-th of its video. A sound file goes before the video's own sound."""
    items: list[Item] = []
    count: dict[str, int] = {}
    for number, record in enumerate(records, 1):
        values = findings.fields(record, ("video_id", "Question", "Choice", "Answer", "Type"), f"record {number}")
        if values is None:
            continue
        video, question, choices, answer, kind = values
        choice = choice_of(choices, str(answer).strip().rstrip("."))
        if choice is None:
            findings.malformed.append(f"record {number}: Answer {answer!r} is no letter of the choices {choices!r}")
            continue
        name = str(video)
        count[name] = count.get(name, 0) + 1
        picture = None if senses == "sound" else findings.video(f"{name}_video")
        sound = None if senses == "picture" else findings.sound(f"{name}_audio", f"{name}_video")
        named = {"duration": "video_duration", "category": "video_category", "topic": "content_parent_category"}
        items.append(
            Item(
                id=f"{name}/{count[name]}",
                video=name,
                path=sound if senses == "sound" else picture,
                sound=sound if senses == "both" and sound != picture else None,
                senses=senses,
                question=str(question).strip(),
                kind="choice",
                answer=choice[1],
                options=choice[0],
                categories={"type": str(kind)} | {k: str(record.get(v) or "unknown") for k, v in named.items()},
            )
        )
    return items


DAILY_OMNI, DAILY_OMNI_PICTURE, DAILY_OMNI_SOUND = (
    Benchmark(
        name=_NAMES[senses],
        title=_TITLES[senses],
        source="https://github.com/Lliar-liar/Daily-Omni (qa.json; Videos/<id>/<id>_video.mp4 and <id>_audio.wav)",
        files=("qa.json", "daily_omni.json"),
        read=functools.partial(read, senses),
        prompts={
            "default": Prompt(_ASKING.format(given="audio" if senses == "sound" else "video"), _AUTHORS),
            "letter": LETTER,
            "plain": PLAIN,
        },
        published={"qa.json": 1197},
        published_groups={"type": _TYPES, "duration": {"30s": 647, "60s": 550}},
        official=official.DAILY_OMNI,
        tables=("type", "duration", "category", "topic"),
        notes="Three benchmarks, by what the model is given: both senses, picture only, sound only.",
    )
    for senses in ("both", "picture", "sound")
)

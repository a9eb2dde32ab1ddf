"""CMM, the Curse of Multi-Modalities (arXiv 2410.12787): yes/no questions about what is there and what is not."""

from __future__ import annotations

from typing import Any

from fmd_ext.lab.eval.benchmarks import official
from fmd_ext.lab.eval.benchmarks.base import PLAIN, Benchmark, Findings, Prompt
from fmd_ext.lab.eval.items import Item

# The paper's measures are accuracies: of the questions whose answer is yes, and of those whose answer is no.
MEASURES = {"yes": "perception accuracy", "no": "hallucination resistance"}
SUB_CATEGORIES = (
    "visual-language",
    "audio-language",
    "visual-audio-language",
    "overrely_visual_ignore_audio",
    "overrely_audio_ignore_visual",
    "overrely_language_ignore_visual",
)
_HOW = "Answer with yes or no."  # behind the questions of some versions of the file, not of all
_NAMES = ("category", "sub_category", "modality", "granularity", "question", "answer")


def read(records: list[Any], findings: Findings) -> list[Item]:
    """A record names a video, a sound file, or both; what it does not name ("None", null) is not given to the model.

    Two records that follow each other and agree in all categories are the two questions about one sample, though their
    files have names of their own: in the published file all 2,400 go in such pairs. They are one ``video``, named after
    the first.
    """
    items: list[Item] = []
    sample, alike = "", None  # the open pair: its name, and what its second record must agree in
    for number, record in enumerate(records, 1):
        where = f"record {number}"
        values = findings.fields(record, _NAMES, where)
        if values is None:
            continue
        category, sub_category, modality, granularity, question, label = map(str, values)
        answer = label.strip().lower().rstrip(".")
        video, sound = (_path(record.get(name)) for name in ("video_path", "audio_path"))
        if answer not in MEASURES:
            findings.malformed.append(f"{where} has the answer {label!r}, not yes or no")
            continue
        if not video and not sound:
            findings.malformed.append(f"{where} names neither a video_path nor an audio_path")
            continue
        path, own = findings.video(video) if video else findings.sound(sound), None
        if video and sound:
            own = findings.sound(sound)
            path = None if own is None else path  # never the video with another sound
        kind = (category, sub_category, modality, granularity, record.get("correlation_type"))
        sample, alike = (sample, None) if kind == alike else (video or sound, kind)
        items.append(
            Item(
                id=f"{number}",
                video=sample,
                path=path,
                sound=own,
                senses="both" if video and sound else "picture" if video else "sound",
                question=question.strip().removesuffix(_HOW).rstrip(),
                kind="yes-no",
                answer=answer,
                categories={
                    "measure": MEASURES[answer],
                    "category": category,
                    "sub-category": sub_category,
                    "sub-category measure": f"{sub_category}, {MEASURES[answer]}",
                    "granularity": granularity,
                    "modality": modality,
                    "video file": video,
                    "sound file": sound,
                },
            )
        )
    return items


def _path(value: Any) -> str:
    text = str(value or "").strip()
    return "" if text.lower() in ("", "none", "null") else text.removeprefix("./")


CMM = Benchmark(
    name="cmm",
    title="CMM",
    source="https://github.com/DAMO-NLP-SG/CMM (all_data_final_reorg.json and the clips, from its dataset's page)",
    files=("all_data_final_reorg.json", "cmm.json", "test.json"),
    read=read,
    prompts={
        "default": Prompt("{question} " + _HOW, "the words that versions of the published questions end in"),
        "plain": PLAIN,
    },
    published={"all": 2400},
    published_groups={
        "measure": dict.fromkeys(MEASURES.values(), 1200),
        "sub-category": dict.fromkeys(SUB_CATEGORIES, 400),
        "granularity": {"object-level": 1000, "event-level": 1400},
    },
    official=official.CMM,
    tables=("measure", "sub-category", "sub-category measure", "category", "granularity", "modality"),
    group_averages=("measure",),
    notes="The mean over measure is that of perception accuracy and hallucination resistance. "
    "A question with a video alone is asked without its sound, one with a sound file alone without a picture.",
)

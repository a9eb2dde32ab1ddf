"""MUSIC-AVQA (CVPR 2022): questions about musical performances with a closed set of answers."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from typing import Any

from fmd_ext.lab.eval.benchmarks.base import PLAIN, Benchmark, Findings, Prompt
from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.parsing import NUMBERS, normal_word

INSTRUMENTS = tuple(
    "accordion,acoustic guitar,bagpipe,banjo,bassoon,cello,clarinet,congas,drum,electric bass,erhu,flute,guzheng,piano,"
    "pipa,saxophone,suona,trumpet,tuba,ukulele,violin,xylophone".split(",")
)
PLACES = ("left", "right", "middle", "indoor", "outdoor", "simultaneously")
COUNTS = (*NUMBERS, "more than ten")
PLACEHOLDER = re.compile(r"<(?:Object|LR|FL|TH|LRer|LL|BA)>")


def read(records: list[Any], findings: Findings) -> list[Item]:
    items: list[Item] = []
    for number, record in enumerate(records, 1):
        where = f"record {number}"
        # The published files spell it so.
        values = findings.fields(record, ("video_id", "type", "question_content", "templ_values", "anser"), where)
        if values is None:
            continue
        if record.get("question_deleted"):
            continue
        video, kinds, template, fillings, answer = values
        kinds, fillings = _decoded(kinds), _decoded(fillings)
        if kinds is None or len(kinds) != 2 or fillings is None:
            findings.malformed.append(
                f"{where}: type and templ_values must be JSON lists (two texts, texts) as strings"
            )
            continue
        if len(PLACEHOLDER.findall(template)) != len(fillings):
            findings.malformed.append(f"{where}: {template!r} has not as many places as values: {fillings}")
            continue
        question = template
        for filling in fillings:
            question = PLACEHOLDER.sub(lambda _, text=filling: text, question, count=1)
        if isinstance(answer, bool) or not isinstance(answer, (str, int)):
            findings.malformed.append(f"{where}: the answer (anser) must be a text, got {answer!r}")
            continue
        modality, aspect = kinds
        items.append(
            Item(
                id=f"{video}/{record.get('question_id', number)}",
                video=str(video),
                path=findings.video(str(video)),
                question=question.strip(),
                kind="word",
                answer=normal_word(str(answer)),
                categories={"modality": modality, "type": f"{modality} {aspect}"},
            )
        )
    answers: dict[str, set[str]] = collections.defaultdict(set)
    for item in items:
        answers[item.categories["type"]].add(item.answer)
    return [dataclasses.replace(item, options=_options(item, answers[item.categories["type"]])) for item in items]


def _options(item: Item, answers: set[str]) -> tuple[str, ...]:
    """All answers that a question of this type can have: the published ones, and those of the file at hand."""
    aspect = item.categories["type"].split()[-1]
    if aspect == "Counting":
        known = COUNTS
    elif aspect in ("Existential", "Comparative"):
        known = ("yes", "no")
    else:
        known = (*INSTRUMENTS, *PLACES, "yes", "no")
    return (*known, *sorted(answers - set(known)))


def _decoded(value: Any) -> list[str] | None:
    """A list that the files hold as a string."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return None
    return [str(text) for text in value] if isinstance(value, list) else None


MUSIC_AVQA = Benchmark(
    name="music-avqa",
    title="MUSIC-AVQA",
    source="https://github.com/GeWu-Lab/MUSIC-AVQA (data/json/avqa-test.json or data/json_update/avqa-test.json)",
    files=(
        "avqa-test.json",
        "json_update/avqa-test.json",
        "json/avqa-test.json",
        "data/json_update/avqa-test.json",
        "data/json/avqa-test.json",
    ),
    read=read,
    prompts={
        "default": Prompt(
            "{question} Answer the question using a single word or phrase.",
            "LLaVA-1.5's wording for short answers: this scorer compares words, no judge model reads sentences",
        ),
        "plain": PLAIN,
    },
    published={"json": 9185, "json_update": 9129},
    tables=("type", "modality"),
    group_averages=("type",),
    notes=(
        "In json some questions are there twice, with another answer; json_update withdrew one of them. Exact match "
        "with the closed set of answers; papers that let a language model judge are not comparable."
    ),
)

"""The benchmarks as one inspect_ai task, with our prompts and our reading of answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageUser, ContentAudio, ContentText, ContentVideo, GenerateConfig
from inspect_ai.scorer import (
    CORRECT,
    INCORRECT,
    NOANSWER,
    Score,
    Scorer,
    Target,
    accuracy,
    grouped,
    scorer,
    stderr,
)
from inspect_ai.solver import TaskState, generate

from fmd_ext.lab.eval.benchmarks import load
from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.run import judged
from fmd_ext.lab.eval.whole_files import whole_file

FORMATS = {".mp4": "mp4", ".mov": "mov", ".mpeg": "mpeg", ".mpg": "mpeg"}


@task
def benchmark(
    name: str, data: str, prompt: str = "default", questions: str | None = None, clips: str | None = None
) -> Task:
    """Questions of a benchmark whose video is there; captions are left out: their scores are of a corpus.

    Args:
        name: of a benchmark, as for ``fmd-ext eval``.
        data, prompt, questions: folder, prompt and question file, as there.
        clips: a folder for copies with just what a question is asked with, where a benchmark gives one sense or has
            sound files of its own.

    Raises ValueError where nothing can be asked, for records that are not as published, and where copies need a folder.
    """
    loaded = load(name, data, prompt=prompt, questions=questions)
    if loaded.malformed:
        raise ValueError(f"{len(loaded.malformed)} records are not as published, the first: {loaded.malformed[0]}")
    items = [item for item in loaded.items if item.kind != "caption" and item.path is not None]
    if not items:
        raise ValueError(f"none of the questions in {', '.join(map(str, loaded.files))} has a video and a score")
    if clips is None and any(item.sound is not None or item.senses != "both" for item in items):
        raise ValueError(
            f"{loaded.benchmark.title} gives one sense, or a sound file of its own: -T clips=FOLDER says where copies "
            "with just that may lie"
        )
    if clips is not None:
        items = [dataclasses.replace(item, path=whole_file(item, Path(clips)), sound=None) for item in items]
    table = loaded.benchmark.tables[0]
    most = max(loaded.benchmark.max_new_tokens[item.kind] for item in items)
    return Task(
        name=f"fmd_{name}",
        dataset=MemoryDataset([_sample(item, table) for item in items], name=name),
        solver=generate(),
        scorer=as_a_person_reads(),
        config=GenerateConfig(temperature=0.0, max_tokens=most),
        metadata={"questions": loaded.digest, "prompt": loaded.prompt.template},
    )


@scorer(metrics=[accuracy(), stderr(cluster="video"), grouped(accuracy(), "group", all=False)])
def as_a_person_reads() -> Scorer:
    """`fmd_ext.lab.eval.parsing`: right, wrong, or no answer (which counts as wrong)."""

    async def score(state: TaskState, target: Target) -> Score:
        about = state.metadata
        item = Item(
            str(state.sample_id), about["video"], None, about["question"], about["kind"], target.text, about["options"]
        )
        parsed, right = judged(item, state.output.completion)
        value = NOANSWER if parsed is None else CORRECT if right else INCORRECT
        return Score(value=value, answer=parsed, explanation=state.output.completion)

    return score


def _sample(item: Item, table: str) -> Sample:
    suffix, path = item.path.suffix.lower(), str(item.path.resolve())
    if item.senses == "sound":
        medium = ContentAudio(audio=path, format="mp3" if suffix == ".mp3" else "wav")
    else:
        medium = ContentVideo(video=path, format=FORMATS.get(suffix, "mp4"))
    metadata: dict[str, Any] = {
        "video": item.video,
        "question": item.question,
        "kind": item.kind,
        "options": item.options,
        "group": next(iter(item.values(table)), "other"),
    }
    message = ChatMessageUser(content=[medium, ContentText(text=item.prompt)])
    return Sample(id=item.id, input=[message], target=item.answer, metadata=metadata)

"""Writes clips as files, and questions about them as AVHBench, MUSIC-AVQA and AVQA publish theirs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fmd_ext.inputs.sample_clip import encode_clip
from fmd_ext.lab.synthetic.questions import Question, questions_about
from fmd_ext.lab.synthetic.scenes import AUDIO_RATE, FRAME_RATE, SPLITS, Scene, draw_picture, draw_sound, scene_of

# One file per benchmark, under a name that the benchmark itself uses.
FILES = {"avhbench": "QA.json", "music_avqa": "avqa-test.json", "avqa": "val_qa.json"}

# Half of the clips match, so that AV matching is as often right as wrong.
BALANCED = ("matched", "silent", "matched", "off-screen", "matched", "swapped")


def write_scene(path: str | Path, scene: Scene) -> Path:
    """Writes the clip of a scene as an mp4 and returns its path. It always has picture and sound, maybe only noise."""
    picture, sound = draw_picture(scene.seen, scene.seed), draw_sound(scene.heard, scene.seed)
    return encode_clip(path, picture, sound, FRAME_RATE, AUDIO_RATE)


def write_dataset(folder: str | Path, split: str, clips: int) -> list[Scene]:
    """Writes the first ``clips`` clips of a split below ``folder/video`` and the questions beside it.

    Beside the files of FILES, ``scenes.json`` says what each clip shows and lets hear. The clips' relations are
    BALANCED. The same split and number give the same files.

    Raises:
        ValueError: an unknown split, or more clips than it has seeds.
    """
    scenes = split_scenes(split, clips, BALANCED)
    folder = Path(folder)
    (folder / "video").mkdir(parents=True, exist_ok=True)
    for scene in tqdm(scenes, desc="writing clips", delay=1.0, leave=False, disable=None):
        write_scene(folder / "video" / f"{clip_name(scene)}.mp4", scene)
    records = records_of(scenes)
    for family, name in FILES.items():
        (folder / name).write_text(json.dumps(records[family], indent=1))
    truth = [{"video_id": clip_name(s), "seen": s.seen, "heard": s.heard, "relation": s.relation} for s in scenes]
    (folder / "scenes.json").write_text(json.dumps(truth, indent=1))
    return scenes


def split_scenes(split: str, clips: int, relations: Sequence[str] = ()) -> list[Scene]:
    """The first scenes of a split; the seeds of two splits never meet.

    ``relations``: given to the clips in turn; none: each clip's seed draws its own.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if not 0 < clips <= len(SPLITS[split]):
        raise ValueError(f"split {split} has 1 to {len(SPLITS[split])} clips, asked for {clips}")
    turns = itertools.cycle(relations or [None])
    return [scene_of(seed, relation) for seed, relation in zip(SPLITS[split][:clips], turns, strict=False)]


def clip_name(scene: Scene) -> str:
    return f"{scene.seed:07d}"


def records_of(scenes: Sequence[Scene]) -> dict[str, list[dict[str, Any]]]:
    """Per family of questions the records of its file."""
    records: dict[str, list[dict[str, Any]]] = {family: [] for family in FILES}
    forms = {"avhbench": _avhbench, "music_avqa": _music_avqa, "avqa": _avqa}
    for scene in scenes:
        for question in questions_about(scene):
            family = records[question.family]
            family.append(forms[question.family](clip_name(scene), question, len(family)))
    return records


def _avhbench(video: str, question: Question, number: int) -> dict[str, Any]:
    label = question.answer.capitalize() if question.answer in ("yes", "no") else question.answer
    return {"video_id": video, "task": question.task, "text": question.text, "label": label}


def _music_avqa(video: str, question: Question, number: int) -> dict[str, Any]:
    return {
        "video_id": video,
        "question_id": number,
        "type": json.dumps(question.task.split()),
        "question_content": question.template,
        "templ_values": json.dumps(question.values),
        "question_deleted": 0,
        "anser": question.answer,  # the published files spell it so
    }


def _avqa(video: str, question: Question, number: int) -> dict[str, Any]:
    return {
        "id": number,
        "video_name": video,
        "video_id": number,
        "question_text": question.text,
        "multi_choice": list(question.choices),
        "answer": question.choices.index(question.answer),
        "question_relation": "Sound" if question.needs == "audio" else "View",
        "question_type": question.task,
    }

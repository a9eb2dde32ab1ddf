"""Draws training samples: which clip, with or without its picture or sound, and which questions about it.

Here lies the imbalance that the method is about: most prompts have a picture only, and where there is sound as well, it
nearly always agrees with the picture. So the picture is the easier and the usual way to an answer about the sound.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from fmd_ext.lab.synthetic import KINDS, Question, Scene, scene_of
from fmd_ext.lab.synthetic.questions import (
    MATCHING_QUESTIONS,
    audio_question,
    caption_question,
    choice_questions,
    matching_question,
    music_questions,
    questions_about,
    video_question,
)
from fmd_ext.lab.training.pool import Pool
from fmd_ext.patching.modality_question import MODALITY_QUESTIONS

# Sorts of samples, and what their prompts have. "compared" are clips of which only is asked whether picture and sound
# belong together; half of them do. "asked" are questions without a clip: which modality does their answer need?
SORTS = {"both": "both", "video": "video", "audio": "audio", "compared": "both", "asked": "none"}


@dataclasses.dataclass(frozen=True)
class Sample:
    """One clip of a batch: items of the pool (None: not in the prompt), and prompts about it with their answers."""

    picture: int | None
    sound: int | None
    questions: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """How many clips of a step are of each sort, and how often picture and sound agree.

    Args:
        clips: of one step, for each of SORTS.
        agreeing: share of clips with picture and sound in which everything seen is heard and nothing else. The rest
            is silent, off-screen or swapped, in equal parts.
    """

    clips: dict[str, int]
    agreeing: float


def draw_samples(pool: Pool, mixture: Mixture, rng: np.random.Generator) -> dict[str, list[Sample]]:
    """The samples of one step for each of SORTS."""
    drawers = {
        "both": _both,
        "video": _picture_only,
        "audio": _sound_only,
        "compared": _compared,
        "asked": _asked_about,
    }
    return {sort: [drawers[sort](pool, mixture, rng) for _ in range(count)] for sort, count in mixture.clips.items()}


def _joined(pool: Pool, agrees: bool, rng: np.random.Generator) -> tuple[Scene, int, int]:
    """A scene, and a picture and a sound of the pool that make it."""
    while True:
        relation = "matched" if agrees else str(rng.choice(["silent", "off-screen", "swapped"]))
        scene = scene_of(int(rng.integers(2**31)), relation)
        if scene.seen in pool.pictures and scene.heard in pool.sounds:
            return scene, int(rng.choice(pool.pictures[scene.seen])), int(rng.choice(pool.sounds[scene.heard]))


def _compared(pool: Pool, mixture: Mixture, rng: np.random.Generator) -> Sample:
    scene, picture, sound = _joined(pool, bool(rng.random() < 0.5), rng)
    question = matching_question(scene, int(rng.integers(len(MATCHING_QUESTIONS))))
    return Sample(picture, sound, _asked([question], rng))


def _both(pool: Pool, mixture: Mixture, rng: np.random.Generator) -> Sample:
    agrees = bool(rng.random() < mixture.agreeing)
    scene, picture, sound = _joined(pool, agrees, rng)
    # Yes and no equally often: a kind that is there in one sense at least, and one that is not.
    present = list(dict.fromkeys((*scene.visible, *scene.heard)))
    absent = [kind for kind in KINDS if kind not in present]
    asked = [str(rng.choice(present)), str(rng.choice(absent))]
    questions = [audio_question(scene, kind) for kind in asked] + [video_question(scene, kind) for kind in asked]
    # Most clips agree; asked every time, the answer would be known without looking.
    if not agrees or rng.random() < (1 - mixture.agreeing) / mixture.agreeing:
        questions += [matching_question(scene, int(rng.integers(len(MATCHING_QUESTIONS))))]
    if rng.random() < 0.4:
        questions.append(caption_question(scene))
    questions += _some(list(music_questions(scene, rng)), 2, rng) + _some(list(choice_questions(scene, rng)), 1, rng)
    return Sample(picture, sound, _asked(questions, rng))


def _picture_only(pool: Pool, mixture: Mixture, rng: np.random.Generator) -> Sample:
    item = int(rng.integers(len(pool.seen)))
    scene = Scene(pool.seen[item], (), "silent", 0)
    questions = [video_question(scene, kind) for kind in _probes(scene.visible, rng)]
    questions += _some(_needing("video", scene, rng), 2, rng)
    if rng.random() < 0.4:
        questions.append(caption_question(scene, "video"))
    return Sample(item, None, _asked(questions, rng))


def _sound_only(pool: Pool, mixture: Mixture, rng: np.random.Generator) -> Sample:
    item = int(rng.integers(len(pool.heard)))
    scene = Scene((None, None), pool.heard[item], "off-screen", 0)
    questions = [audio_question(scene, kind) for kind in _probes(scene.heard, rng)]
    questions += _some(_needing("audio", scene, rng), 1, rng)
    if rng.random() < 0.4:
        questions.append(caption_question(scene, "audio"))
    return Sample(None, item, _asked(questions, rng))


def _asked_about(pool: Pool, mixture: Mixture, rng: np.random.Generator) -> Sample:
    scene = scene_of(int(rng.integers(2**31)))
    captions = [caption_question(scene, senses) for senses in ("video", "audio")]
    questions = _some([*questions_about(scene), *captions], 5, rng)
    return Sample(None, None, tuple(asked_about(question, rng.random() < 0.4) for question in questions))


def asked_about(question: Question, instructed: bool = False) -> tuple[str, str]:
    """The question which modality ``question`` needs, and its answer, as `fmd_ext.patch` asks it."""
    return MODALITY_QUESTIONS["en"].about(question.asked(instructed)[0]), question.needs


def _asked(questions: list[Question], rng: np.random.Generator) -> tuple[tuple[str, str], ...]:
    return tuple(question.asked(instructed=rng.random() < 0.4) for question in questions)


def _probes(present: tuple[str, ...], rng: np.random.Generator) -> list[str]:
    """A kind that is there, if there is one, and one that is not."""
    absent = [kind for kind in KINDS if kind not in present]
    return [str(rng.choice(kinds)) for kinds in (present, absent) if kinds]


def _needing(sense: str, scene: Scene, rng: np.random.Generator) -> list[Question]:
    every = [*music_questions(scene, rng), *choice_questions(scene, rng)]
    return [question for question in every if question.needs == sense]


def _some(questions: list[Question], count: int, rng: np.random.Generator) -> list[Question]:
    chosen = rng.permutation(len(questions))[:count]
    return [questions[index] for index in chosen]

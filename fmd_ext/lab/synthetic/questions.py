"""Questions about a scene and their answers, after the templates of AVHBench, MUSIC-AVQA and AVQA."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from fmd_ext.lab.synthetic.kinds import KINDS
from fmd_ext.lab.synthetic.scenes import SIDES, Scene, ordered

COUNTS = ("zero", "one", "two")
LETTERS = "ABCD"

AUDIO_TASK = "Video-driven Audio Hallucination"
VIDEO_TASK = "Audio-driven Video Hallucination"
MATCHING_TASK = "AV Matching"
CAPTIONING_TASK = "AV Captioning"
AVHBENCH_TASKS = (AUDIO_TASK, VIDEO_TASK, MATCHING_TASK, CAPTIONING_TASK)

MATCHING_QUESTIONS = (
    "Are the contexts of audio and visual content matching?",
    "Do the audio and the video belong together?",
)


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Args:
        family: ``"avhbench"``, ``"music_avqa"`` or ``"avqa"``.
        task: the benchmark's own name of the kind of question; of MUSIC-AVQA ``"Audio Counting"`` and the like.
        needs: what must be perceived to answer: ``"audio"``, ``"video"`` or ``"both"``.
        text: the question, values filled in.
        answer: of AVQA the text of the right choice.
        template: of MUSIC-AVQA, with ``<Object>`` and ``<LR>``; else empty.
        values: that fill the template's places.
        choices: of AVQA.
    """

    family: str
    task: str
    needs: str
    text: str
    answer: str
    template: str = ""
    values: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()

    def asked(self, instructed: bool = False) -> tuple[str, str]:
        """Prompt and answer. ``instructed``: followed by how to answer, in the words that evaluations use.

        The choices of a plain question are answered by their text, those of an instructed one by their letter.
        """
        options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False)]
        if not instructed or self.task == CAPTIONING_TASK:
            return " ".join([self.text, *options]), self.answer
        if options:
            how = "Answer with the option's letter from the given choices directly."
            return "\n".join([self.text, *options, how]), LETTERS[self.choices.index(self.answer)]
        how = "yes or no." if self.answer in ("yes", "no") else "the question using a single word or phrase."
        return f"{self.text} Answer {how}", self.answer


def yes_no(truth: bool) -> str:
    return "yes" if truth else "no"


# --- AVHBench -----------------------------------------------------------------------------------------------------


def audio_question(scene: Scene, kind: str) -> Question:
    text = f"Is the {kind} making sound in the audio?"
    return Question("avhbench", AUDIO_TASK, "audio", text, yes_no(kind in scene.heard))


def video_question(scene: Scene, kind: str) -> Question:
    text = f"Is the {kind} visible in the video?"
    return Question("avhbench", VIDEO_TASK, "video", text, yes_no(kind in scene.seen))


def matching_question(scene: Scene, wording: int = 0) -> Question:
    matches = set(scene.visible) == set(scene.heard)
    return Question("avhbench", MATCHING_TASK, "both", MATCHING_QUESTIONS[wording], yes_no(matches))


def caption_question(scene: Scene, senses: str = "both") -> Question:
    """``senses``: "both" is AVHBench's; "video" and "audio" ask for one half of it."""
    seen, heard = f"I see {listing(scene.visible)}.", f"I hear {listing(scene.heard)}."
    text, answer = {
        "both": ("Describe what you see and hear.", f"{seen} {heard}"),
        "video": ("Describe what you see.", seen),
        "audio": ("Describe what you hear.", heard),
    }[senses]
    return Question("avhbench", CAPTIONING_TASK, senses, text, answer)


def listing(kinds: tuple[str, ...]) -> str:
    return " and ".join(f"a {kind}" for kind in kinds) or "nothing"


# --- MUSIC-AVQA ---------------------------------------------------------------------------------------------------


def _music(task: str, needs: str, template: str, answer: str, *values: str) -> Question:
    text = template
    for value in values:
        place = next(place for place in ("<Object>", "<LR>") if place in text)
        text = text.replace(place, value, 1)
    return Question("music_avqa", task, needs, text, answer, template, values)


def music_questions(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """Every type that the scene has an answer to, once. Comparative and temporal questions have no counterpart here."""
    kind, side = str(rng.choice(list(KINDS))), int(rng.integers(2))
    heard = COUNTS[len(scene.heard)]
    yield _music("Audio Counting", "audio", "How many musical instruments were heard throughout the video?", heard)
    kinds = COUNTS[len(scene.visible)]
    yield _music("Visual Counting", "video", "How many types of musical instruments appeared in the video?", kinds)
    count = COUNTS[scene.seen.count(kind)]
    yield _music("Visual Counting", "video", "How many <Object> are in the entire video?", count, kind)
    answer = scene.seen[side] or "nothing"
    yield _music("Visual Location", "video", "What kind of instrument is the <LR> instrument?", answer, SIDES[side])
    sounding = [bool(seen) and seen in scene.heard for seen in scene.seen]
    both = COUNTS[len({seen for seen, sounds in zip(scene.seen, sounding, strict=True) if sounds})]
    template = "How many instruments in the video did not sound from beginning to end?"
    silent = COUNTS[len([kind for kind in scene.visible if kind not in scene.heard])]
    yield _music("Audio-Visual Counting", "both", template, silent)
    yield _music("Audio-Visual Counting", "both", "How many sounding instruments are in the video?", both)
    if scene.seen[side]:
        template = "Is the <LR> instrument always playing?"
        yield _music("Audio-Visual Existential", "both", template, yes_no(sounding[side]), SIDES[side])
    if sum(sounding) == 1:
        where = SIDES[sounding.index(True)]
        yield _music("Audio-Visual Location", "both", "Where is the sounding instrument?", where)


# --- AVQA ---------------------------------------------------------------------------------------------------------


def choice_questions(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """Which kind is heard and which is seen, of four choices; where just one of the kinds is."""
    for kinds, needs, text in (
        (scene.heard, "audio", "What makes the sound in the video?"),
        (scene.visible, "video", "What is the main object in the video?"),
    ):
        if len(kinds) != 1:
            continue
        other = scene.visible if needs == "audio" else scene.heard
        # What the other sense perceives is among the choices: it is what misleads.
        wrong = [kind for kind in other if kind not in kinds]
        wrong += [str(kind) for kind in rng.permutation([k for k in KINDS if k not in (*kinds, *wrong)])]
        choices = [*kinds, *wrong[:3]]
        choices = tuple(str(choice) for choice in rng.permutation(choices))
        yield Question("avqa", "Which", needs, text, kinds[0], choices=choices)


# --- all ----------------------------------------------------------------------------------------------------------


def probed_kinds(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Kinds to ask about: all that are seen or heard, then one that is neither."""
    present = ordered((*scene.visible, *scene.heard))
    absent = [kind for kind in KINDS if kind not in present]
    return [*present, str(rng.choice(absent))]


def questions_about(scene: Scene) -> list[Question]:
    """All questions about a scene; the same for the same scene."""
    rng = np.random.default_rng([scene.seed, 3])
    kinds = probed_kinds(scene, rng)
    return [
        *(audio_question(scene, kind) for kind in kinds),
        *(video_question(scene, kind) for kind in kinds),
        *(matching_question(scene, wording) for wording in range(len(MATCHING_QUESTIONS))),
        caption_question(scene),
        *music_questions(scene, rng),
        *choice_questions(scene, rng),
    ]

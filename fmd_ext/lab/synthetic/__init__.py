"""Short clips with known content, and questions about them in the formats of public benchmarks."""

from __future__ import annotations

from fmd_ext.lab.synthetic.dataset import split_scenes, write_dataset, write_scene
from fmd_ext.lab.synthetic.kinds import KINDS
from fmd_ext.lab.synthetic.questions import AVHBENCH_TASKS, Question, questions_about
from fmd_ext.lab.synthetic.scenes import RELATIONS, SPLITS, Scene, draw_picture, draw_sound, scene_of

__all__ = [
    "AVHBENCH_TASKS",
    "KINDS",
    "RELATIONS",
    "SPLITS",
    "Question",
    "Scene",
    "draw_picture",
    "draw_sound",
    "questions_about",
    "scene_of",
    "split_scenes",
    "write_dataset",
    "write_scene",
]

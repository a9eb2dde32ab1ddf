"""Ways to tell what a question needs other than asking, on validation clips: the branches' confidence, attention."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

import fmd_ext
from fmd_ext.lab.diagnose import attention_share
from fmd_ext.lab.evidence.answers import YesNoQuestions, scores
from fmd_ext.lab.evidence.rivals import GROUPS, group_of
from fmd_ext.lab.synthetic.questions import AUDIO_TASK, VIDEO_TASK


def measure_alternatives(questions: YesNoQuestions, model: nn.Module, prompts: int) -> dict[str, Any]:
    """As JSON holds it.

    * ``confidence``: accuracy by group when the answer is that of the branch with the larger margin, all layers forked.
    * ``attention``: the share of questions, of ``prompts`` about the sound and as many about the picture, told apart
      by where the last token of the unpatched model looks, at the threshold that is best for these very questions.
    """
    layers = model.config.get_text_config().num_hidden_layers
    alone = []
    for weight in (0.0, 1.0):
        with fmd_ext.patch(model, masking="attention", fork_layers=layers, text_weight=weight):
            alone.append(questions.ask(model))
    surer = np.where(np.abs(alone[0]) > np.abs(alone[1]), *alone)
    right, groups = scores(questions.items, surer), np.array([group_of(item) for item in questions.items])
    found = {
        task: np.array([_visual_share(model, *asked) for _, *asked in questions.prompts(model, task, prompts)])
        for task in (AUDIO_TASK, VIDEO_TASK)
    }
    return {
        "confidence": {group: round(float(right[groups == group].mean()), 4) for group in GROUPS},
        "attention": {"told_apart": round(told_apart(found[AUDIO_TASK], found[VIDEO_TASK]), 4), "prompts": 2 * prompts},
    }


def told_apart(low: np.ndarray, high: np.ndarray) -> float:
    """The share of both samples on the right side of the threshold that is best for them; either side may be right."""
    thresholds = np.concatenate([low, high, [-np.inf]])
    below = np.array([(low <= t).sum() + (high > t).sum() for t in thresholds]) / (len(low) + len(high))
    return float(max(below.max(), 1 - below.min()))


def _visual_share(model: nn.Module, position: int, inputs: dict[str, Any]) -> float:
    """Of what the token gives to the clip, the part that goes to the picture; mean over layers and heads."""
    mean = attention_share(model, inputs, position).mean(None)
    return mean["visual"] / (mean["visual"] + mean["audio"])

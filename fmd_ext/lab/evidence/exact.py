"""Every method on questions with open answers and choices, after MUSIC-AVQA and AVQA, exactly answered."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from fmd_ext.lab.eval.statistics import compare, holm, proportion
from fmd_ext.lab.evidence.answers import Item
from fmd_ext.lab.evidence.prompts import WholePrompts
from fmd_ext.lab.evidence.rivals import Settings, rivals

FAMILIES = ("music_avqa", "avqa")
KINDS = {"Audio": "MUSIC-AVQA audio", "Visual": "MUSIC-AVQA visual", "Audio-Visual": "MUSIC-AVQA both", "Which": "AVQA"}
GROUPS = tuple(f"{kind}, {how}" for kind in KINDS.values() for how in ("agreeing", "disagreeing"))


def group_of(item: Item) -> str:
    """Of GROUPS: the question's kind, and whether its clip's senses agree."""
    return f"{KINDS[item.task.split()[0]]}, {'agreeing' if item.relation == 'matched' else 'disagreeing'}"


def measure_exact(model: nn.Module, questions: WholePrompts, settings: dict[str, Settings]) -> dict[str, Any]:
    """As JSON holds it: accuracy by group, and against vanilla with Holm's correction over all.

    Args:
        questions: of FAMILIES.
        settings: of each method, by name, as chosen before on other questions.
    """
    layers = model.config.get_text_config().num_hidden_layers
    groups, clips = np.array([group_of(item) for item in questions.items]), np.array([i.clip for i in questions.items])
    answers = {
        rival.name: rival.ask(model, questions, settings[rival.name])[0]
        for rival in tqdm(rivals(layers), desc="exact answers", mininterval=5.0, disable=None)
    }
    rows: list[dict[str, Any]] = []
    for name, right in answers.items():
        for group in GROUPS:
            chosen = groups == group
            estimate = proportion(right[chosen], clips[chosen])
            row = {key: round(getattr(estimate, key), 4) for key in ("value", "low", "high")}
            rows.append({"name": name, "group": group, "items": int(chosen.sum())} | row)
            if name != "vanilla":
                found = compare(right[chosen], answers["vanilla"][chosen], clips[chosen])
                rows[-1] |= {"difference": round(found.difference.value, 4), "p_value": float(found.p_value)}
    tested = [row for row in rows if "p_value" in row]
    for row, adjusted in zip(tested, holm([row["p_value"] for row in tested]), strict=True):
        row["p_adjusted"] = adjusted
    return {"clips": len(set(clips.tolist())), "items": len(questions.items), "methods": rows}

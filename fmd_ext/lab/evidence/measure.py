"""What is measured: all fork depths, both maskings, weights of the merge and of the mask; settings chosen beforehand.

Settings are chosen on clips of the validation split. Everything that is reported is measured on the test split.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

import fmd_ext
from fmd_ext.lab.diagnose import AttentionShare, attention_share
from fmd_ext.lab.eval.statistics import compare, holm, proportion
from fmd_ext.lab.evidence.answers import Item, YesNoQuestions, scores
from fmd_ext.lab.synthetic import Scene
from fmd_ext.lab.synthetic.questions import AUDIO_TASK, MATCHING_TASK, VIDEO_TASK
from fmd_ext.lab.synthetic.scenes import RELATIONS
from fmd_ext.lab.training.pool import Pool
from fmd_ext.lab.training.scoring import exact_answers

TASKS = (AUDIO_TASK, VIDEO_TASK, MATCHING_TASK)
DISAGREEING = ", disagreeing clips"
# What is counted: each task on all clips; the two that ask for one sense also where picture and sound disagree.
GROUPS = (*TASKS, AUDIO_TASK + DISAGREEING, VIDEO_TASK + DISAGREEING)
ALPHAS = (0.5, 0.65, 0.8, 0.9, 1.0)
MASK_SCALES = (0.25, 0.5, 0.75, 1.0)
TEXT_WEIGHTS = (0.0, 0.25, 0.75, 1.0)  # beside 0.5, which the grid has
TEXT_DEPTHS = (1, 2, 3, 6)

Settings = dict[str, Any]


def zero_grid(num_layers: int) -> list[Settings]:
    depths = range(1, num_layers + 1)
    return [{"masking": "zero", "fork_layers": depth, "alpha": alpha} for depth in depths for alpha in ALPHAS]


def attention_grid(num_layers: int) -> list[Settings]:
    return [{"masking": "attention", "fork_layers": depth} for depth in range(1, num_layers + 1)]


def ask_all(questions: YesNoQuestions, model: nn.Module, settings: Sequence[Settings]) -> list[np.ndarray]:
    """Scores [items] of every setting."""
    results = []
    for chosen in tqdm(settings, desc="settings", mininterval=5.0, disable=None):
        with fmd_ext.patch(model, **chosen):
            results.append(scores(questions.items, questions.ask(model)))
    return results


def macro_accuracy(items: Sequence[Item], right: np.ndarray) -> float:
    """Mean over the tasks, so that the number of questions of a task does not count."""
    return float(np.mean([right[of_task(items, task)].mean() for task in TASKS]))


def of_task(items: Sequence[Item], task: str, relation: str | None = None) -> np.ndarray:
    return np.array([item.task == task and relation in (None, item.relation) for item in items])


def of_group(items: Sequence[Item], group: str) -> np.ndarray:
    """bool [items], of one of GROUPS."""
    task, _, part = group.partition(",")
    return of_task(items, task) & np.array([not part or item.relation != "matched" for item in items])


def choose(questions: YesNoQuestions, model: nn.Module) -> dict[str, Any]:
    """For each masking the settings with the best mean over the tasks on the clips of ``questions``."""
    layers = model.config.get_text_config().num_hidden_layers
    found: dict[str, Any] = {"clips": len({item.clip for item in questions.items}), "items": len(questions.items)}
    found["vanilla"] = macro_accuracy(questions.items, scores(questions.items, questions.ask(model)))
    for masking, grid in (("zero", zero_grid(layers)), ("attention", attention_grid(layers))):
        reached = [macro_accuracy(questions.items, right) for right in ask_all(questions, model, grid)]
        best = int(np.argmax(reached))
        found[masking] = {"settings": grid[best], "accuracy": reached[best]}
    return found


def measure(questions: YesNoQuestions, model: nn.Module, chosen: dict[str, Any]) -> dict[str, Any]:
    """Everything on the test split, as JSON would hold it."""
    items, start = questions.items, time.perf_counter()
    clips = np.array([item.clip for item in items])
    layers = model.config.get_text_config().num_hidden_layers
    margins = questions.ask(model)
    vanilla = scores(items, margins)
    grid = zero_grid(layers) + attention_grid(layers)
    softer = [{**base, "mask_scale": scale} for base in _soft_bases(chosen) for scale in MASK_SCALES]
    results = ask_all(questions, model, grid + softer)

    best = {masking: results[grid.index(chosen[masking]["settings"])] for masking in ("zero", "attention")}
    return {
        "clips": len(set(clips.tolist())),
        "yes": {task: float(np.mean([item.answer for item in items if item.task == task])) for task in TASKS},
        "says_yes": {task: float((margins > 0)[of_task(items, task)].mean()) for task in TASKS},
        "vanilla": _row(items, clips, {}, vanilla)["groups"],
        "relations": {
            name: {
                task: {relation: _accuracy(right, clips, of_task(items, task, relation)) for relation in RELATIONS}
                for task in TASKS
            }
            for name, right in (("vanilla", vanilla), *best.items())
        },
        "grid": [_row(items, clips, settings, right) for settings, right in zip(grid, results, strict=False)],
        "mask_scale": [
            _row(items, clips, settings, right) for settings, right in zip(softer, results[len(grid) :], strict=True)
        ],
        "comparisons": _comparisons(items, vanilla, best, clips),
        "seconds": round(time.perf_counter() - start, 1),
    }


def measure_tasks(model: nn.Module, processor: Any, pool: Pool, scenes: Sequence[Scene]) -> list[dict[str, Any]]:
    """What the unpatched model reaches on every sort of question, exactly answered, where picture and sound agree."""
    table: dict[tuple[str, bool], list[bool]] = {}
    for task, relation, right in exact_answers(model, processor, pool, scenes):
        table.setdefault((task, relation == "matched"), []).append(right)
    return [
        {"task": task, "agreeing": agreeing, "accuracy": round(float(np.mean(right)), 4), "items": len(right)}
        for (task, agreeing), right in sorted(table.items())
    ]


def _soft_bases(chosen: dict[str, Any]) -> list[Settings]:
    """What soft masking is tried with: the chosen settings, and a deeper fork."""
    deeper = {"masking": "zero", "fork_layers": 2, "alpha": 0.8}
    return [chosen["zero"]["settings"], *([deeper] if deeper != chosen["zero"]["settings"] else [])]


def measure_text_weights(questions: YesNoQuestions, model: nn.Module) -> list[dict[str, Any]]:
    """Attention masking on the test split with other weights of the branches at text positions.

    0 leaves them to the audio branch alone, 1 to the visual one.
    """
    clips = np.array([item.clip for item in questions.items])
    grid = [
        {"masking": "attention", "fork_layers": depth, "text_weight": weight}
        for depth in TEXT_DEPTHS
        for weight in TEXT_WEIGHTS
    ]
    results = ask_all(questions, model, grid)
    return [_row(questions.items, clips, settings, right) for settings, right in zip(grid, results, strict=True)]


def attention_before_and_after(
    questions: YesNoQuestions, model: nn.Module, settings: Sequence[Settings], prompts: int
) -> list[dict[str, Any]]:
    """Shares of the last question token's attention, by layer, averaged over ``prompts`` questions about the sound."""
    table = []
    for chosen in ({}, *settings):
        asked = questions.prompts(model, AUDIO_TASK, prompts)
        shares = [_share(model, inputs, position, chosen) for _, position, inputs in asked]
        layers = [(layer.layer, layer.branch) for layer in shares[0].layers]
        for index, (layer, branch) in enumerate(layers):
            means = {
                name: float(np.mean([getattr(share.layers[index], name) for share in shares]))
                for name in ("visual", "audio", "text")
            }
            table.append({"settings": chosen, "layer": layer, "branch": branch, **means})
    return table


def _share(model: nn.Module, inputs: dict[str, Any], position: int, settings: Settings) -> AttentionShare:
    if not settings:
        return attention_share(model, inputs, position)
    with fmd_ext.patch(model, **settings):
        return attention_share(model, inputs, position)


def _row(items: Sequence[Item], clips: np.ndarray, settings: Settings, right: np.ndarray) -> dict[str, Any]:
    return {"settings": settings, "groups": {g: _accuracy(right, clips, of_group(items, g)) for g in GROUPS}}


def _accuracy(right: np.ndarray, clips: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
    estimate = proportion(right[chosen], clips[chosen])
    return {key: round(getattr(estimate, key), 4) for key in ("value", "low", "high")} | {"items": int(chosen.sum())}


def _comparisons(
    items: Sequence[Item], vanilla: np.ndarray, best: dict[str, np.ndarray], clips: np.ndarray
) -> list[dict[str, Any]]:
    """Each masking at its chosen settings against vanilla, per group; p-values adjusted for their number (Holm)."""
    rows = []
    for masking, right in best.items():
        for group in GROUPS:
            chosen = of_group(items, group)
            found = compare(right[chosen], vanilla[chosen], clips[chosen])
            bounds = {key: round(getattr(found.difference, key), 4) for key in ("value", "low", "high")}
            changes = {"gained": int(found.gained), "lost": int(found.lost), "p_value": float(found.p_value)}
            rows.append({"masking": masking, "group": group, **bounds, **changes})
    for row, adjusted in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_adjusted"] = adjusted
    return rows

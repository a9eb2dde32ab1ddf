"""Fork-merge decoding beside its rivals: the same questions as whole prompts, every method through the model's forward.

Each method's settings are chosen on validation clips; what is reported is measured on test clips.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

import fmd_ext
from fmd_ext.engine.routes import NEEDS
from fmd_ext.lab import baselines
from fmd_ext.lab.eval.statistics import compare, holm, proportion
from fmd_ext.lab.evidence.answers import Item
from fmd_ext.lab.evidence.prompts import Cost, WholePrompts
from fmd_ext.lab.synthetic.questions import AUDIO_TASK, MATCHING_TASK, VIDEO_TASK

TASKS = {AUDIO_TASK: "sound", VIDEO_TASK: "picture", MATCHING_TASK: "matching"}
GROUPS = tuple(f"{name}, {how}" for name in TASKS.values() for how in ("agreeing", "disagreeing"))
ROUTED, BY_TRUTH = "FMD, routed", "FMD, routed by truth"
TIMED_ROUNDS, TIMED_BATCHES = 5, 3
LEAST_LOSS = 0.01  # that counts, when settings are chosen
SENSE_OF = {"visual": "video", "audio": "audio", "both": "both"}  # what a prompt keeps of its clip
NEED_OF = {sense: need for need, sense in SENSE_OF.items()}

Settings = dict[str, Any]
# (model, questions, settings, number of batches or None) -> 1 or 0 per item, and what it cost
Ask = Callable[..., tuple[np.ndarray, Cost]]


@dataclasses.dataclass(frozen=True)
class Rival:
    """A method, and the settings among which validation clips choose; the first are its published ones, or ours."""

    name: str
    grid: Sequence[Settings]
    ask: Ask


def _within(context: Callable[..., contextlib.AbstractContextManager[Any]]) -> Ask:
    def ask(
        model: nn.Module, questions: WholePrompts, settings: Settings, limit: int | None = None
    ) -> tuple[np.ndarray, Cost]:
        with context(model, questions, **settings):
            return questions.ask(model, limit=limit)

    return ask


def _routed(model: nn.Module, questions: WholePrompts, **settings: Any) -> Any:
    return fmd_ext.patch(model, processor=questions.processor, **settings)


def _routed_by_truth(model: nn.Module, questions: WholePrompts, **settings: Any) -> Any:
    needs = {text: NEED_OF[need] for text, need in zip(questions.texts, questions.needs, strict=True)}

    def route(asked: Sequence[str]) -> np.ndarray:
        return np.eye(len(NEEDS))[[NEEDS.index(needs[question]) for question in asked]]

    router = fmd_ext.Router(questions.processor, route=route)
    return fmd_ext.patch(model, processor=router, **settings)


def _vanilla(
    model: nn.Module, questions: WholePrompts, settings: Settings, limit: int | None = None
) -> tuple[np.ndarray, Cost]:
    return questions.ask(model, limit=limit)


def _drop_by_truth(
    model: nn.Module, questions: WholePrompts, settings: Settings, limit: int | None = None
) -> tuple[np.ndarray, Cost]:
    return questions.ask(model, questions.needs, limit)


def _drop_by_asking(
    model: nn.Module, questions: WholePrompts, settings: Settings, limit: int | None = None
) -> tuple[np.ndarray, Cost]:
    likeliest = routes_of(model, questions).probabilities.argmax(1)
    return questions.ask(model, [SENSE_OF[NEEDS[index]] for index in likeliest], limit)


def time_ratio(model: nn.Module, questions: WholePrompts, rival: Rival, settings: Settings) -> float:
    """Seconds per question over vanilla's, the median of TIMED_ROUNDS rounds in which both run in turn."""
    ratios = []
    for _ in range(TIMED_ROUNDS):
        seconds = []
        for ask, chosen in ((_vanilla, {}), (rival.ask, settings)):
            right, cost = ask(model, questions, chosen, TIMED_BATCHES)
            seconds.append(cost.seconds / cost.questions)
        ratios.append(seconds[1] / seconds[0])
    return float(np.median(ratios))


def routes_of(model: nn.Module, questions: WholePrompts) -> fmd_ext.Routes:
    """What the model says each question needs."""
    with fmd_ext.patch(model, text_weight="auto", processor=questions.processor) as handle:
        return handle.routes(questions.texts)


def rivals(layers: int) -> list[Rival]:
    """All methods. The decoder has ``layers`` layers."""
    depths = sorted({1, 2, 3, layers})
    attention = [{"masking": "attention", "fork_layers": depth} for depth in depths]
    zero = [{"masking": "zero", "fork_layers": depth, "alpha": 1.0} for depth in depths]
    pairs = ((1.0, 0.0), (0.8, 0.2), (1.0, 0.2), (1.0, 0.3), (1.0, 0.4))
    weights = [{"visual": visual, "audio": audio} for visual, audio in pairs]
    routed = [{**settings, "text_weight": weight} for settings in attention for weight in weights]
    return [
        Rival("vanilla", [{}], _vanilla),
        Rival("FMD", [*zero, *attention], _within(lambda model, questions, **s: fmd_ext.patch(model, **s))),
        Rival(ROUTED, routed, _within(_routed)),
        Rival(BY_TRUTH, routed, _within(_routed_by_truth)),
        Rival(
            "FMD, routed, zero masking", [{**s, "text_weight": w} for s in zero for w in weights[:2]], _within(_routed)
        ),
        Rival("drop a sense, by asking", [{}], _drop_by_asking),
        Rival("drop a sense, by truth", [{}], _drop_by_truth),
        Rival("MAD", [{"gamma": g, "wording": w} for w in ("published", "en") for g in (2.5, 1.0)], _within(_mad)),
        Rival("OutRo", [{}], _within(lambda model, questions, **s: baselines.outro(model, **s))),
        Rival("VCD", [{"contrast": c} for c in (1.0, 0.3)], _within(lambda model, q, **s: baselines.vcd(model, **s))),
        Rival("AVCD", [{"contrast": c} for c in (2.5, 0.5)], _within(lambda model, q, **s: baselines.avcd(model, **s))),
        Rival("PAI", [{"gamma": g} for g in (1.1, 1.5)], _within(lambda model, q, **s: baselines.pai(model, **s))),
    ]


def _mad(model: nn.Module, questions: WholePrompts, **settings: Any) -> Any:
    return baselines.mad(model, processor=questions.processor, **settings)


def group_of(item: Item) -> str:
    """The group of GROUPS, or "" for a question of another family."""
    name = TASKS.get(item.task)
    return f"{name}, {'agreeing' if item.relation == 'matched' else 'disagreeing'}" if name else ""


def best_of(items: Sequence[Item], vanilla: np.ndarray, answers: Sequence[np.ndarray]) -> int:
    """Which of several settings' ``answers`` to take: of those that lose no more than LEAST_LOSS against vanilla in any
    group, else of all, the one with the best mean over groups."""
    groups = np.array([group_of(item) for item in items])
    harmless = [
        all(right[groups == group].mean() >= vanilla[groups == group].mean() - LEAST_LOSS for group in GROUPS)
        for right in answers
    ]
    means = [macro(items, right) - (any(harmless) and not good) for right, good in zip(answers, harmless, strict=True)]
    return int(np.argmax(means))


def macro(items: Sequence[Item], right: np.ndarray) -> float:
    """Mean over GROUPS, so that the number of questions of a group does not count."""
    groups = np.array([group_of(item) for item in items])
    return float(np.mean([right[groups == group].mean() for group in GROUPS]))


def measure_rivals(model: nn.Module, validation: WholePrompts, test: WholePrompts) -> dict[str, Any]:
    """Every method on the test questions, with the settings that validation chose, as JSON holds it."""
    layers = model.config.get_text_config().num_hidden_layers
    found: dict[str, Any] = {"clips": len({item.clip for item in test.items}), "items": len(test.items)}
    found["validation_clips"] = len({item.clip for item in validation.items})
    rows, answers, vanilla = [], {}, validation.ask(model)[0]
    for rival in tqdm(rivals(layers), desc="rivals", mininterval=5.0, disable=None):
        best = 0
        if len(rival.grid) > 1:
            reached = [rival.ask(model, validation, settings)[0] for settings in rival.grid]
            best = best_of(validation.items, vanilla, reached)
        settings = rival.grid[best]
        right, cost = rival.ask(model, test, settings)
        answers[rival.name] = right
        row = _row(rival.name, settings, test, right, cost)
        rows.append(row | {"time": round(time_ratio(model, test, rival, settings), 3)})
    routes = routes_of(model, test)
    likeliest = np.array(NEEDS)[routes.probabilities.argmax(1)]
    truth = np.array([NEED_OF[need] for need in test.needs])
    found["router"] = {
        need: {
            "right": round(float((likeliest == truth)[truth == need].mean()), 4),
            "items": int((truth == need).sum()),
        }
        for need in NEEDS
    }
    found["methods"] = rows
    found["against_vanilla"] = _comparisons(test.items, answers, "vanilla")
    found["against_mad"] = _comparisons(test.items, {n: answers[n] for n in (ROUTED, "MAD")}, "MAD")
    return found


def _row(name: str, settings: Settings, test: WholePrompts, right: np.ndarray, cost: Cost) -> dict[str, Any]:
    groups, clips = np.array([group_of(item) for item in test.items]), np.array([item.clip for item in test.items])
    tasks = np.array([item.task for item in test.items])
    return {
        "name": name,
        "settings": settings,
        "groups": {group: _accuracy(right, clips, groups == group) for group in GROUPS},
        "tasks": {task: _accuracy(right, clips, tasks == task) for task in dict.fromkeys(tasks.tolist())},
        "cost": dataclasses.asdict(cost),
    }


def _accuracy(right: np.ndarray, clips: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
    estimate = proportion(right[chosen], clips[chosen])
    return {key: round(getattr(estimate, key), 4) for key in ("value", "low", "high")} | {"items": int(chosen.sum())}


def _comparisons(items: Sequence[Item], answers: dict[str, np.ndarray], baseline: str) -> list[dict[str, Any]]:
    """Each method against ``baseline`` per group; p-values adjusted for their number (Holm)."""
    groups, clips = np.array([group_of(item) for item in items]), np.array([item.clip for item in items])
    rows = []
    for name, right in answers.items():
        for group in GROUPS if name != baseline else ():
            chosen = groups == group
            found = compare(right[chosen], answers[baseline][chosen], clips[chosen])
            bounds = {key: round(getattr(found.difference, key), 4) for key in ("value", "low", "high")}
            rows.append({"name": name, "group": group, **bounds, "p_value": float(found.p_value)})
    for row, adjusted in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_adjusted"] = adjusted
    return rows

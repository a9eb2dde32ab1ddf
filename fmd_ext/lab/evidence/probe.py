"""A linear probe as the judge of what a question needs, in place of asking: on validation clips' questions.

The probe reads the hidden state of the prompt that asks (its last token, after half of the layers) and is fitted to a
few prompts whose need is known, by multinomial logistic regression with an L2 penalty.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fmd_ext
from fmd_ext.adapters import find_adapter
from fmd_ext.engine.routes import NEEDS
from fmd_ext.lab.eval.statistics import compare, holm
from fmd_ext.lab.evidence.prompts import WholePrompts
from fmd_ext.lab.evidence.rivals import GROUPS, NEED_OF, Settings, group_of, routes_of
from fmd_ext.lab.synthetic import Scene, questions_about
from fmd_ext.patching.routing import Router

DRAWS = 5  # of the labelled prompts
OTHER_LABELLED = 5  # prompts per need, of other families of questions
SAME, OTHER = "same templates", "other templates"
SAME_LABELLED = {"visual": 2, "audio": 2, "both": 1}  # prompts, of AVHBench's templates with other objects
PENALTY = 1.0


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """Args: ``mean``, ``scale`` [hidden] of the labelled states; ``weight`` [3, hidden] and ``bias`` [3] of NEEDS."""

    mean: torch.Tensor
    scale: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def fitted(cls, states: torch.Tensor, needs: Sequence[str]) -> LinearProbe:
        """From float32 states [n, hidden] and their needs, one of NEEDS each."""
        truth = torch.tensor([NEEDS.index(need) for need in needs])
        mean, scale = states.mean(0), states.std(0) + 1e-3
        weight = torch.zeros(len(NEEDS), states.shape[1], requires_grad=True)
        bias = torch.zeros(len(NEEDS), requires_grad=True)
        solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            solver.zero_grad()
            found = cross_entropy(((states - mean) / scale) @ weight.T + bias, truth)
            found = found + PENALTY * weight.square().sum() / (2 * len(truth))
            found.backward()
            return found

        solver.step(loss)
        return cls(mean, scale, weight.detach(), bias.detach())

    def routes(self, states: torch.Tensor) -> np.ndarray:
        """float32 [n, 3]: probabilities of NEEDS, of states [n, hidden]."""
        return (((states - self.mean) / self.scale) @ self.weight.T + self.bias).softmax(1).numpy()


@torch.no_grad()
def states_of(model: nn.Module, processor: Any, texts: Sequence[str], layer: int) -> torch.Tensor:
    """float32 [n, hidden]: of the last token of the prompt that asks about each text, after ``layer`` layers."""
    router, decoder = Router(processor), find_adapter(model).find_decoder(model)
    found = []
    for text in texts:
        ids = torch.tensor([router.prompt_ids(text)])
        hidden = decoder(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        found.append(hidden[layer][0, -1].float())
    return torch.stack(found)


def measure_probe(
    model: nn.Module, questions: WholePrompts, scenes: Sequence[Scene], settings: Settings
) -> dict[str, Any]:
    """As JSON holds it: how often asking and the probe name the need, and what routing by the one gives over the other.

    Args:
        questions: of AVHBench, about ``scenes``. Those whose text a draw has labelled do not count.
        settings: of FMD, the same for both routers.
    """
    layer = model.config.get_text_config().num_hidden_layers // 2
    known = {q.asked()[0]: (NEED_OF[q.needs], q.family) for scene in scenes for q in questions_about(scene)}
    texts = list(known)
    states = dict(zip(texts, states_of(model, questions.processor, texts, layer), strict=True))
    asked = dict(zip(questions.texts, routes_of(model, questions).probabilities, strict=True))
    own = set(questions.texts)
    pools = {
        SAME: (SAME_LABELLED, [text for text in texts if text in own]),
        OTHER: (dict.fromkeys(NEEDS, OTHER_LABELLED), [text for text in texts if known[text][1] != "avhbench"]),
    }
    found: dict[str, Any] = {
        "layer": layer,
        "clips": len({item.clip for item in questions.items}),
        "asked": {"right": _named(asked, own, known)},
    }
    for name, (wanted, pool) in pools.items():
        right, routed = [], None
        for draw in range(DRAWS):
            labelled = _drawn(pool, known, wanted, draw)
            probe = LinearProbe.fitted(torch.stack([states[t] for t in labelled]), [known[t][0] for t in labelled])
            left = sorted(own - set(labelled))
            routes = dict(zip(left, probe.routes(torch.stack([states[text] for text in left])), strict=True))
            right.append(_named(routes, left, known))
            if routed is None:
                routed = _routed(model, questions, settings, asked, routes)
        found[name] = {"labelled": sum(wanted.values()), "right": [round(value, 4) for value in right]} | routed
    return found


def _drawn(pool: Sequence[str], known: dict[str, Any], wanted: dict[str, int], draw: int) -> list[str]:
    """So many texts of each need, of the ``draw``-th shuffle."""
    shuffled = [pool[index] for index in np.random.default_rng(draw).permutation(len(pool))]
    return [t for need, count in wanted.items() for t in [t for t in shuffled if known[t][0] == need][:count]]


def _named(routes: dict[str, np.ndarray], texts: Any, known: dict[str, Any]) -> float:
    """The share of ``texts`` whose need is named rightly, the mean over NEEDS."""
    right = {need: [] for need in NEEDS}
    for text in texts:
        right[known[text][0]].append(NEEDS[routes[text].argmax()] == known[text][0])
    return float(np.mean([np.mean(values) for values in right.values()]))


def _routed(
    model: nn.Module,
    questions: WholePrompts,
    settings: Settings,
    asked: dict[str, np.ndarray],
    routes: dict[str, np.ndarray],
) -> dict[str, Any]:
    """Accuracy by group of FMD routed by asking and by the probe, and the difference; of texts that ``routes`` has."""
    answers = []
    for known in (asked, {**asked, **routes}):
        router = fmd_ext.Router(
            questions.processor, route=lambda texts, known=known: np.stack([known[t] for t in texts])
        )
        with fmd_ext.patch(model, processor=router, **settings):
            answers.append(questions.ask(model)[0])
    groups, clips = np.array([group_of(item) for item in questions.items]), np.array([i.clip for i in questions.items])
    counts = np.array([text in routes for text in questions.texts])
    rows = []
    for group in GROUPS:
        chosen = counts & (groups == group)
        by_asking, by_probe = (right[chosen] for right in answers)
        difference = compare(by_probe, by_asking, clips[chosen])
        bounds = {key: round(getattr(difference.difference, key), 4) for key in ("value", "low", "high")}
        means = {"asking": round(float(by_asking.mean()), 4), "probe": round(float(by_probe.mean()), 4)}
        rows.append({"group": group, "items": int(chosen.sum())} | means | bounds | {"p_value": difference.p_value})
    for row, adjusted in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_adjusted"] = adjusted
    return {"routed": rows}

"""A trial: branches without the markers around a clip that they do not see, on validation clips' questions.

Markers (``<|audio_bos|>`` and the like) are text, in every branch. Here they have the label of what they enclose, so
that with attention masking the other branch lacks them too, as a prompt without that modality does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

import fmd_ext
from fmd_ext.lab.evidence.prompts import WholePrompts
from fmd_ext.lab.evidence.rivals import GROUPS, Settings, comparisons, group_of
from fmd_ext.labels import TEXT


class MarkedPrompts(WholePrompts):
    """Whole prompts whose markers are labelled as what they enclose; for a patched model."""

    def inputs(self, numbers: np.ndarray, senses: str = "both") -> dict[str, Any]:
        given, opening = super().inputs(numbers, senses), self.openings[senses]
        labels = torch.zeros_like(given["input_ids"])
        labels[:, : len(opening.labels)] = marked(opening.labels)
        return given | {"modality_labels": labels}


def marked(labels: torch.Tensor) -> torch.Tensor:
    """Labels [length] with the position before and the one behind every clip labelled as the clip."""
    found = labels.clone()
    for at in torch.nonzero(labels != TEXT).flatten().tolist():
        for beside in (at - 1, at + 1):
            if 0 <= beside < len(labels) and labels[beside] == TEXT:
                found[beside] = labels[at]
    return found


def measure_markers(
    model: nn.Module, plain: WholePrompts, without: MarkedPrompts, settings: list[Settings]
) -> dict[str, Any]:
    """As JSON holds it: accuracy by group without the markers, and against the same settings with them."""
    groups, rows = np.array([group_of(item) for item in plain.items]), []
    for chosen in settings:
        with fmd_ext.patch(model, processor=plain.processor, **chosen):
            answers = {"with": plain.ask(model)[0], "without": without.ask(model)[0]}
        right = {group: round(float(answers["without"][groups == group].mean()), 4) for group in GROUPS}
        found = comparisons(plain.items, answers, "with")
        rows.append({"settings": chosen, "without": right, "against": found})
    return {"clips": len({item.clip for item in plain.items}), "items": len(plain.items), "rows": rows}

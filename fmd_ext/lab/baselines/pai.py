"""Attention reweighting after PAI, "Paying more attention to image": Liu et al., arXiv 2407.21771; code LALBJ/PAI.

In the row of the token that is being decided (the prompt's last one, then every generated one), the attention scores of
the clip's positions are raised before the softmax, ``s + boost * |s|``, in all layers from ``first_layer`` on; and the
logits are contrasted with those of a run that does not see the clip:

    logits = gamma * log p(y | clip, text) - (gamma - 1) * log p(y | text)

What differs from the public code: image positions are here those of the chosen modalities, so that audio alone can be
raised; the run without the clip keeps the positions of the text, whose keys are the only ones seen; it is decided per
sample of a batch. The public code starts at layer 2 with boost 0.5 (LLaVA) and gamma 1.1; so do the defaults.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fmd_ext.adapters import JOINT, LABELS
from fmd_ext.config import MODALITIES
from fmd_ext.lab.baselines.attention import attention_scores, attention_without, visible_keys, weighted_values
from fmd_ext.lab.baselines.decoding import (
    Method,
    Run,
    Sequence,
    applied,
    check_modalities,
    check_range,
    plausible,
)


@contextlib.contextmanager
def pai(
    model: nn.Module,
    *,
    boost: float = 0.5,
    gamma: float = 1.1,
    beta: float = 0.1,
    first_layer: int = 2,
    modalities: Iterable[str] = MODALITIES,
) -> Iterator[Method]:
    """Within this context ``model.generate`` decodes with raised attention to the clip.

    Args:
        model: a supported model, not patched, with attn_implementation "sdpa" or "eager".
        boost: the paper's alpha, 0 or more; 0 leaves attention as it is.
        gamma: 1 or more; 1 needs no second run.
        beta: plausibility in [0, 1], as in VCD; used with the contrast only.
        first_layer: the layers before it are left alone.
        modalities: whose positions are raised: of ``"visual"`` and ``"audio"``. Joint positions always are.

    Raises:
        ValueError: a value out of range, or a patched model.
        TypeError: a model or an attention implementation that is not supported.
    """
    check_range("boost", boost, 0)
    check_range("gamma", gamma, 1)
    check_range("beta", beta, 0, 1)
    check_range("first_layer", first_layer, 0)
    chosen = check_modalities(modalities)
    method = _PAI(boost, gamma, beta, first_layer, [JOINT, *(LABELS[name] for name in chosen)])
    with applied(model, method):
        yield method


class _PAI(Method):
    def __init__(self, boost: float, gamma: float, beta: float, first_layer: int, raised: list[int]) -> None:
        super().__init__()
        self.boost, self.gamma, self.beta, self.first_layer, self.raised = boost, gamma, beta, first_layer, raised

    def begin(self, sequence: Sequence, call: dict[str, Any]) -> None:
        if self.gamma > 1:
            sequence.add_runs("blind")

    def attention(
        self, sequence: Sequence, run: Run | None, attend: Callable[..., Any], module: nn.Module, *args: Any, **kw: Any
    ) -> Any:
        query, key, value, mask, scale = args
        if run is not None:
            return attention_without((sequence.labels > 0)[:, None], query, key, value, mask, scale), None
        out, weights = attend(module, query, key, value, mask, scaling=scale, **kw)
        if module.layer_idx < self.first_layer or self.boost == 0:
            return out, weights
        last = query[:, :, -1:]
        seen = visible_keys(mask, query, key)[:, :, -1:]
        scores = attention_scores(last, key, scale)
        raised = torch.isin(sequence.labels, torch.tensor(self.raised, device=scores.device))[:, None, None]
        prompt = scores[..., : raised.shape[-1]]
        scores[..., : raised.shape[-1]] = torch.where(raised, prompt + self.boost * prompt.abs(), prompt)
        scores = scores.masked_fill(~seen, -torch.inf)
        out = out.clone()
        out[:, -1:] = weighted_values(scores.softmax(-1), value, out)
        return out, weights

    def logits(self, sequence: Sequence, plain: Tensor, second: Callable[[str], Tensor]) -> Tensor:
        if not sequence.runs:
            return plain
        seeing, blind = plain.log_softmax(-1), second("blind").log_softmax(-1)
        return plausible(self.gamma * seeing - (self.gamma - 1) * blind, plain, self.beta)

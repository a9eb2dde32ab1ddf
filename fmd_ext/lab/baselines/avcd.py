"""Audio-visual contrastive decoding (AVCD): Jung, Jang, Chung, arXiv 2505.20862; public code kaistmm/AVCD.

The prompt's last token tells which of language (the text after the clip), video and audio gets the most attention per
position. The other two are the less dominant ones, 1 and 2; their most attended positions are hidden:

    logits = (2 + 2 contrast) l - 2 contrast l[1 and 2 hidden] + l[1 hidden] + l[2 hidden]

A step at which the plain model's entropy is below ``min_entropy`` is left as it is. A position is hidden, per layer and
head and in all layers but the last, when the last prompt token's attention to it is above a threshold: the median over
all positions of that token's attention in the plain run, averaged over layers and heads.

What differs from the public code, as far as it can be read: the masked runs have caches of their own, so dominance,
threshold and hidden positions are decided on the prompt instead of again for every token, and generated text is never
hidden; hidden positions are keys that nobody attends to (there the mask lies on the query dimension, which silences
the positions' own rows); the logits are divided by 4, the sum of the coefficients, so that a sampling temperature
keeps its meaning; implausible tokens get -inf (there -0.0001); it works per sample of a batch, and samples without
both video and audio are decoded plainly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fmd_ext.adapters import AUDIO, PADDING, TEXT, VISUAL, find_adapter
from fmd_ext.lab.baselines.attention import attention_scores, attention_without, visible_keys
from fmd_ext.lab.baselines.decoding import (
    Method,
    Run,
    Sequence,
    applied,
    check_range,
    plausible,
)
from fmd_ext.lab.baselines.prompts import has_both, refuse_joint

BOTH, FIRST, SECOND = "both hidden", "first hidden", "second hidden"


@contextlib.contextmanager
def avcd(model: nn.Module, *, contrast: float = 0.5, beta: float = 0.2, min_entropy: float = 0.6) -> Iterator[Method]:
    """Within this context ``model.generate`` decodes by AVCD. The defaults are those of the public code.

    Args:
        model: a supported model, not patched, with attn_implementation "sdpa" or "eager".
        contrast: the paper's alpha, 0 or more.
        beta: plausibility in [0, 1], as in VCD.
        min_entropy: in nats, 0 or more; 0 contrasts at every step.

    Raises:
        ValueError: a value out of range, a patched model, or, in ``generate``, joint positions.
        TypeError: a model or an attention implementation that is not supported.
    """
    check_range("contrast", contrast, 0)
    check_range("beta", beta, 0, 1)
    check_range("min_entropy", min_entropy, 0)
    num_layers = len(find_adapter(model).find_decoder(model).layers)
    if num_layers < 2:
        raise ValueError("AVCD leaves the last layer alone, and this model has no other")
    method = _AVCD(contrast, beta, min_entropy, num_layers)
    with applied(model, method):
        yield method


class _Measured:
    """The last prompt token's attention in the plain run.

    Attributes:
        attention: float32 [batch, heads, prompt length], summed over the layers but the last.
        regions: label of each position [batch, prompt length], PADDING where it belongs to none of the three.
        threshold: [batch], set when all layers are in.
        dominant: [batch], label of the dominant one.
        both: [batch] bool, samples that have video and audio.
    """

    def __init__(self, labels: Tensor, num_layers: int) -> None:
        self.attention: Tensor | None = None
        self.num_layers = num_layers
        clip = labels > TEXT
        after = clip.long().cumsum(-1) == clip.sum(-1, keepdim=True)  # behind the last position of the clip
        self.regions = torch.where(clip | (after & (labels == TEXT)), labels, PADDING)
        self.valid = labels != PADDING
        self.both = has_both(labels)

    def add(self, weights: Tensor) -> None:
        self.attention = weights if self.attention is None else self.attention + weights

    @property
    def threshold(self) -> Tensor:
        mean = (self.attention / self.num_layers).masked_fill(~self.valid[:, None], torch.nan)
        return mean.nanquantile(0.5, dim=-1).mean(-1)

    @property
    def dominant(self) -> Tensor:
        total = self.attention.mean(1)
        per_position = [(total * (self.regions == label)).sum(-1) / (self.regions == label).sum(-1).clamp(min=1)
                        for label in (TEXT, VISUAL, AUDIO)]  # fmt: skip
        return torch.stack(per_position, -1).argmax(-1)  # the labels are 0, 1 and 2

    def hidden_in(self, name: str) -> Tensor:
        """bool [batch, prompt length]: positions that run ``name`` may hide."""
        others = torch.tensor([[VISUAL, AUDIO], [TEXT, AUDIO], [TEXT, VISUAL]], device=self.regions.device)
        first, second = others[self.dominant].unbind(-1)
        in_first, in_second = self.regions == first[:, None], self.regions == second[:, None]
        return {BOTH: in_first | in_second, FIRST: in_first, SECOND: in_second}[name]


class _AVCD(Method):
    def __init__(self, contrast: float, beta: float, min_entropy: float, num_layers: int) -> None:
        super().__init__()
        self.contrast, self.beta, self.min_entropy = contrast, beta, min_entropy
        self.last_layer = num_layers - 1

    def begin(self, sequence: Sequence, call: dict[str, Any]) -> None:
        refuse_joint(sequence.labels, "AVCD")
        sequence.measured = _Measured(sequence.labels, self.last_layer)
        if sequence.measured.both.any():
            sequence.add_runs(BOTH, FIRST, SECOND)

    def attention(
        self, sequence: Sequence, run: Run | None, attend: Callable[..., Any], module: nn.Module, *args: Any, **kw: Any
    ) -> Any:
        query, key, value, mask, scale = args
        layer, measured = module.layer_idx, sequence.measured
        is_prompt = key.shape[2] == sequence.labels.shape[1]
        if layer == self.last_layer or not sequence.runs:
            return attend(module, query, key, value, mask, scaling=scale, **kw)
        if run is None:
            if is_prompt:
                measured.add(_last_row(query, key, mask, scale))
            return attend(module, query, key, value, mask, scaling=scale, **kw)
        if is_prompt:
            attended = _last_row(query, key, mask, scale) > measured.threshold[:, None, None]
            run.hidden[layer] = attended & measured.hidden_in(run.name)[:, None]
        return attention_without(run.hidden[layer], query, key, value, mask, scale), None

    def logits(self, sequence: Sequence, plain: Tensor, second: Callable[[str], Tensor]) -> Tensor:
        if not sequence.runs:
            return plain
        log_p = plain.log_softmax(-1)
        entropy = -torch.where(log_p.isfinite(), log_p.exp() * log_p, 0.0).sum(-1)
        contrasts = sequence.measured.both & (entropy >= self.min_entropy)
        if not contrasts.any():
            return plain
        mixed = (2 + 2 * self.contrast) * plain - 2 * self.contrast * second(BOTH) + second(FIRST) + second(SECOND)
        return torch.where(contrasts[:, None], plausible(mixed / 4, plain, self.beta), plain)


def _last_row(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention weights float32 [batch, num_qo_heads, keys] of the last query."""
    seen = visible_keys(mask, query, key)[:, :, -1]
    return attention_scores(query[:, :, -1:], key, scale)[:, :, 0].masked_fill(~seen, -torch.inf).softmax(-1)

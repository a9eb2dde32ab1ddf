"""OutRo: Yoo, Jang, Chung, "On the Nature of Attention Sink that Shapes Decoding Strategy in Omni-LLMs", arXiv
2603.14337; public code kaistmm/OutRo (``model/outro.py``, and where ``model/modeling_qwen2_5_omni.py`` calls it).

It has no second run: it changes attention outputs, before their projection, where the prompt has attention sinks. A
token is a sink in a layer when the largest magnitude of the hidden state that goes into it is at least
``max(least, ratio * median)``, the median being that of all magnitudes of the prompt there. In all layers but the last
two:

1. At every ``max(1, num_layers // 7)``-th layer, beginning with the first, a sink that has not had its turn attends to
   the whole prompt, also to what comes after it. Each does so in one layer only.
2. In a layer with sinks, with v the mean of their value vectors (per key-value head), every output o of a head at a
   token that has been a sink in no layer so far is turned towards v and keeps its norm:

       o' = o + tanh(relu(cos(o, v)) / temperature) * gamma * |o . v| / |v|^2 * v,    o' * |o| / |o'|

A model without such tokens is left as it is. How many a prompt has is counted (``sink_tokens`` of the context's value),
and an evaluation notes with each answer whose prompt has none that the method does not act.

What differs from the public code: it works per sample of a batch, and padding neither counts in the median nor is
attended to; it is computed in float32; generated tokens count as tokens that are no sinks and are turned too, by the
sinks of the prompt (the public code compares a token's index within the call with the prompt's sinks, so that no
generated token is turned where the prompt's first token is a sink; its evaluations generate one token, where the two
are the same); a later turn on the same cache is treated as generated tokens are. Its settings: least 100, ratio 1000,
gamma 3, temperature 0.1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fmd_ext.adapters import PADDING, find_adapter
from fmd_ext.lab.baselines.attention import attention_scores, weighted_values
from fmd_ext.lab.baselines.decoding import Method, Run, Sequence, applied, check_range

LAYERS_LEFT_ALONE = 2  # the last ones
NO_SINK = "no sink token: the method does not act"


@contextlib.contextmanager
def outro(
    model: nn.Module,
    *,
    least: float = 100.0,
    ratio: float = 1000.0,
    gamma: float = 3.0,
    temperature: float = 0.1,
) -> Iterator[Method]:
    """Within this context ``model.generate`` decodes by OutRo, prompts without a clip too.

    Args:
        model: a supported model, not patched.
        least: 0 or more: the magnitude that a sink must have at least.
        ratio: 0 or more: how many times the median it must have.
        gamma: 0 or more: how far outputs are turned; 0 leaves them.
        temperature: above 0: how soon the turn is a full one.

    The context's value has ``sink_tokens``: tokens of the last prompt that were a sink in some layer, per sample.

    Raises:
        ValueError: a value out of range, a patched model, or one of no more than two layers.
        TypeError: a model that is not supported.
    """
    check_range("least", least, 0)
    check_range("ratio", ratio, 0)
    check_range("gamma", gamma, 0)
    check_range("temperature", temperature, 1e-6)
    num_layers = len(find_adapter(model).find_decoder(model).layers)
    if num_layers <= LAYERS_LEFT_ALONE:
        raise ValueError(f"OutRo leaves the last two layers alone, and this model has {num_layers}")
    with applied(model, OutRo(least, ratio, gamma, temperature, num_layers)) as method:
        yield method


class _Sinks:
    """The sinks of a prompt.

    Attributes:
        valid: bool [batch, prompt length]: no padding.
        by_layer: layer -> bool [batch, prompt length].
        values: layer -> float32 [batch, num_kv_heads, head_dim], the sinks' mean value vector; zeros without any.
        seen: bool [batch, prompt length]: sinks of some layer so far.
        relaxed: those that have attended to the whole prompt.
    """

    def __init__(self, valid: Tensor) -> None:
        self.valid = valid
        self.by_layer: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.seen = torch.zeros_like(valid)
        self.relaxed = torch.zeros_like(valid)


class OutRo(Method):
    """See `outro`.

    Attributes:
        sink_tokens: per sample of the last prompt.
    """

    needs_clip = False

    def __init__(self, least: float, ratio: float, gamma: float, temperature: float, num_layers: int) -> None:
        super().__init__()
        self.least, self.ratio, self.gamma, self.temperature = least, ratio, gamma, temperature
        self.end = num_layers - LAYERS_LEFT_ALONE
        self.interval = max(1, num_layers // 7)
        self.sink_tokens: list[int] = []

    def begin(self, sequence: Sequence, call: dict[str, Any]) -> None:
        sequence.measured = _Sinks(sequence.labels != PADDING)

    def layer_input(self, sequence: Sequence, run: Run | None, layer: int, hidden: Tensor) -> None:
        sinks = sequence.measured
        if sequence.length or layer >= self.end:
            return
        sizes = hidden.abs().float()
        medians = torch.stack([sample[valid].median() for sample, valid in zip(sizes, sinks.valid, strict=True)])
        threshold = (self.ratio * medians).clamp(min=self.least)
        sinks.by_layer[layer] = (sizes.amax(-1) >= threshold[:, None]) & sinks.valid

    def attention(
        self, sequence: Sequence, run: Run | None, attend: Callable[..., Any], module: nn.Module, *args: Any, **kw: Any
    ) -> Any:
        query, key, value, mask, scale = args
        out, weights = attend(module, query, key, value, mask, scaling=scale, **kw)
        layer, sinks = module.layer_idx, sequence.measured
        if layer >= self.end:
            return out, weights
        turned = torch.ones(out.shape[:2], dtype=torch.bool, device=out.device)
        if not sequence.length:
            found = sinks.by_layer[layer]
            sinks.seen |= found
            if not found.any():
                return out, weights
            total = value.float().masked_fill(~found[:, None, :, None], 0).sum(2)
            sinks.values[layer] = total / found.sum(1).clamp(min=1)[:, None, None]
            if layer % self.interval == 0:
                out = self._relaxed(sinks, found & ~sinks.relaxed, out, query, key, value, scale)
            turned = sinks.valid & ~sinks.seen
        if layer not in sinks.values:
            return out, weights
        towards = sinks.values[layer].repeat_interleave(out.shape[2] // value.shape[1], dim=1)
        turned = turned & sinks.by_layer[layer].any(-1, keepdim=True)
        return torch.where(turned[:, :, None, None], self._turned(out, towards[:, None]), out), weights

    def _relaxed(
        self, sinks: _Sinks, due: Tensor, out: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """``out`` [batch, length, num_qo_heads, head_dim] with the ``due`` sinks attending to the whole prompt."""
        out = out.clone()
        for sample in due.any(-1).nonzero().flatten().tolist():
            own = slice(sample, sample + 1)
            scores = attention_scores(query[own][:, :, due[sample]], key[own], scale)
            seen = scores.masked_fill(~sinks.valid[sample], -torch.inf).softmax(-1)
            out[sample, due[sample]] = weighted_values(seen, value[own], out)[0]
        sinks.relaxed |= due
        return out

    def _turned(self, out: Tensor, towards: Tensor) -> Tensor:
        """Head outputs [batch, length, num_qo_heads, head_dim] turned towards [batch, 1, num_qo_heads, head_dim]."""
        given = out.float()
        norm = given.norm(dim=-1, keepdim=True)
        along = (given * towards).sum(-1, keepdim=True)
        squared = (towards * towards).sum(-1, keepdim=True)
        cosine = along / (norm * squared.sqrt()).clamp(min=1e-12)
        gate = (cosine.relu() / self.temperature).tanh()
        moved = given + gate * self.gamma * along.abs() / (squared + 1e-8) * towards
        return (moved * (norm / (moved.norm(dim=-1, keepdim=True) + 1e-8))).to(out.dtype)

    def logits(self, sequence: Sequence, plain: Tensor, second: Callable[[str], Tensor]) -> Tensor:
        if sequence.length == sequence.labels.shape[1]:  # the prompt's
            self.sink_tokens = sequence.measured.seen.sum(-1).tolist()
            self.notes = [{} if count else {NO_SINK: ""} for count in self.sink_tokens]
        return plain

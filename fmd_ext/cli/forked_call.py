"""A forked call of a small random decoder against two plain passes, for ``fmd-ext doctor``."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import fmd_ext
from fmd_ext.engine.reference import reference_hidden
from fmd_ext.labels import AUDIO, TEXT, VISUAL

LABELS = torch.tensor([[TEXT] * 3 + [VISUAL] * 6 + [AUDIO] * 5 + [TEXT] * 4])  # [1, length]
NUM_TOKENS = 2


@dataclasses.dataclass(frozen=True)
class ForkedCall:
    """What one masking on one device gave, in logits of all positions and in greedy tokens.

    Attributes:
        error: largest absolute difference of the patched model's logits from two plain passes in float64.
        allowed: what rounding costs: twice the error of two plain passes in the model's dtype, and eight spacings of
            that dtype at the largest logit.
        effect: largest absolute difference between the exact logits and the unpatched model's: what forking changes.
        shortfalls: for each greedy token of ``generate``, by how much its exact logit, of two plain passes in float64
            over all before it, is less than the largest one: 0, or what rounding may exchange.
        fusions: `Handle.fusions`, in words.
    """

    error: float
    allowed: float
    effect: float
    shortfalls: list[float]
    fusions: dict[str, str]

    @property
    def is_right(self) -> bool:
        tokens_are_right = len(self.shortfalls) == NUM_TOKENS and max(self.shortfalls) <= 2 * self.allowed
        return self.error <= self.allowed < self.effect and tokens_are_right


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The model is so small that threads would wait for each other, on a busy machine for seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
@torch.no_grad()
def forked_call(masking: str, device: torch.device, dtype: torch.dtype) -> ForkedCall:
    """Patches a random Qwen2-like decoder of four layers, two of them forked, calls it, lets it generate two tokens.

    Draws from a random state of its own. Raises what the call raises.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _random_decoder().to(device, dtype)
        embeds = torch.randn(*LABELS.shape, model.config.hidden_size).to(device, dtype)
    exact = copy.deepcopy(model).to("cpu", torch.float64)
    labels = LABELS.to(device)
    with fmd_ext.patch(model, adapter="text", fork_layers=2, masking=masking, alpha=0.7, text_weight=0.4) as handle:
        config = handle.config
        fusions = {name: str(fusion) for name, fusion in handle.fusions.items()}
        ours = model(inputs_embeds=embeds, modality_labels=labels).logits
        # Without an end-of-sequence token, which would end the answer early.
        tokens = model.generate(
            inputs_embeds=embeds,
            modality_labels=labels,
            attention_mask=torch.ones_like(labels),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0].tolist()
    plain = model.lm_head(reference_hidden(model.model, config, embeds, labels)).double().cpu()
    unpatched = model(inputs_embeds=embeds).logits.double().cpu()
    sequence, known = embeds.double().cpu(), LABELS
    first = last = exact.lm_head(reference_hidden(exact.model, config, sequence, known))
    shortfalls = []
    for token in tokens:
        if shortfalls:
            last = exact.lm_head(reference_hidden(exact.model, config, sequence, known))
        shortfalls.append(float(last[0, -1].max() - last[0, -1, token]))
        sequence = torch.cat([sequence, exact.model.embed_tokens(torch.tensor([[token]]))], 1)
        known = torch.cat([known, torch.tensor([[TEXT]])], 1)
    spacing = torch.finfo(dtype).eps * first.abs().max()
    return ForkedCall(
        error=float((ours.double().cpu() - first).abs().max()),
        allowed=float(2 * (plain - first).abs().max() + 8 * spacing),
        effect=float((unpatched - first).abs().max()),
        shortfalls=shortfalls,
        fusions=fusions,
    )


def _random_decoder() -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,  # so large that attention and tokens differ from row to row
    )
    return Qwen2ForCausalLM(config).eval()

"""Random-weight Qwen2.5-Omni thinkers of a given size, and the paper's two passes written with their layers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from fmd_ext.adapters import find_adapter
from fmd_ext.compat import cache_kwargs
from fmd_ext.config import FMDConfig
from fmd_ext.lab.tiny.model import tiny_thinker_config
from fmd_ext.lab.tiny.vocabulary import VOCAB_SIZE
from fmd_ext.labels import AUDIO, TEXT, VISUAL

from .workload import Size


def build_thinker(
    size: Size,
    max_length: int | None,
    dtype: torch.dtype,
    device: torch.device,
    vocab_size: int = VOCAB_SIZE,
    encoder_size: int = 0,
) -> nn.Module:
    """A thinker with a text decoder of ``size``, on scaled_dot_product_attention, in eval mode.

    Its vocabulary is small: the output layer, which costs the same with and without fork-merge decoding, would only
    dilute the ratios.

    Args:
        max_length: positions that the decoder is made for; None: as many as it takes.
        encoder_size: channels of encoders that are run; for the size "full" the whole model is then as published. 0:
            the encoders are tiny and never run.
    """
    config = _config(size, max_length, vocab_size, encoder_size)
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Qwen2_5OmniThinkerForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def _config(size: Size, max_length: int | None, vocab_size: int, encoder_size: int) -> Qwen2_5OmniThinkerConfig:
    if encoder_size and size.name == "full":
        return Qwen2_5OmniThinkerConfig()
    given = {"max_position_embeddings": max_length, "encoder_size": encoder_size}
    config = tiny_thinker_config(
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        num_heads=size.num_qo_heads,
        num_kv_heads=size.num_kv_heads,
        intermediate_size=size.intermediate_size,
        vocab_size=vocab_size,
        **{name: value for name, value in given.items() if value},
    )
    config.initializer_range = config.text_config.initializer_range = 0.5 * size.hidden_size**-0.5
    return config


def sharing_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules on the same weights: one can be patched while the other stays as it is."""
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in weights})


class TwoPasses:
    """The paper's way with zero masking: two whole passes through the early layers, one cache each, then the merge.

    The model's own layers run, as the vanilla decoder runs them.
    """

    def __init__(self, model: nn.Module, config: FMDConfig) -> None:
        self.decoder = find_adapter(model).find_decoder(model)
        self.head = model.get_output_embeddings()
        self.config = config

    def __call__(self, embeds: Tensor, labels: Tensor, caches: tuple[DynamicCache, DynamicCache]) -> Tensor:
        """Logits [1, length, vocabulary] of ``embeds`` [1, length, hidden] and ``labels`` [1, length] behind caches."""
        past, length = caches[0].get_seq_length(), embeds.shape[1]
        positions = torch.arange(past, past + length, device=embeds.device).expand(3, 1, length)
        rotary = self.decoder.rotary_emb(embeds, positions)

        def layers(hidden: Tensor, cache: DynamicCache, begin: int, end: int) -> Tensor:
            for layer in self.decoder.layers[begin:end]:
                hidden = layer(
                    hidden, attention_mask=None, position_embeddings=rotary, **cache_kwargs(cache), use_cache=True
                )
            return hidden

        fork_layers = self.config.fork_layers
        branches = [
            layers(embeds.masked_fill((labels == masked)[..., None], 0.0), cache, 0, fork_layers)
            for masked, cache in zip((AUDIO, VISUAL), caches, strict=True)
        ]
        text_weight, alpha_visual, alpha_audio, _ = self.config.merge_weights
        weight = torch.full(labels.shape, text_weight, device=embeds.device)
        weight = weight.masked_fill(labels == VISUAL, alpha_visual).masked_fill(labels == AUDIO, 1 - alpha_audio)
        weight = weight[..., None].to(embeds.dtype)
        merged = weight * branches[0] + (1 - weight) * branches[1]
        return self.head(self.decoder.norm(layers(merged, caches[0], fork_layers, len(self.decoder.layers))))


def text_labels(count: int, device: torch.device) -> Tensor:
    return torch.full((1, count), TEXT, device=device)

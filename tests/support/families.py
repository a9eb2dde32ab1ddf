"""Models of all families, small and with seeded weights, and a batch of inputs for each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fmd_ext.lab.tiny import tiny_thinker
from fmd_ext.lab.tiny.qwen3_omni import tiny_qwen3_thinker
from omni_inputs import QWEN3, TEXT_ONLY, VIDEO_AUDIO, build_inputs
from phi4_inputs import batch, tiny_phi4
from ports import PORTS


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family.

    Args:
        qkv, gate_up: how many of its modules' linears are joined.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], dict[str, Any]]
    qkv: int = 4
    gate_up: int = 4
    patch: dict[str, Any] = dataclasses.field(default_factory=dict)


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, num_hidden_layers=4, initializer_range=0.2, **sizes)).eval()


def labelled_text(model):
    ids = torch.arange(5, 25)[None]
    return {"input_ids": ids, "modality_labels": torch.tensor([[0] * 3 + [1] * 7 + [2] * 5 + [0] * 5])}


FAMILIES = {
    "qwen2_5_omni": Family(tiny_thinker, lambda model: build_inputs([VIDEO_AUDIO, TEXT_ONLY])),
    # The other MLPs are experts, whose weights transformers has joined.
    "qwen3_omni": Family(
        tiny_qwen3_thinker, lambda model: build_inputs([VIDEO_AUDIO, TEXT_ONLY], family=QWEN3), gate_up=0
    ),
    "phi4_multimodal": Family(tiny_phi4, lambda model: batch(), qkv=0, gate_up=0),  # joined by its authors
    "text": Family(tiny_llama, labelled_text, patch={"adapter": "text"}),
}
FAMILIES |= {
    name: Family(
        port.make,
        lambda model, port=port: port.together(model, port.batches["padded"]),
        port.num_layers,
        port.num_layers,
    )
    for name, port in PORTS.items()
}

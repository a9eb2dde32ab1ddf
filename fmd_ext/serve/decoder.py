"""A text decoder of vLLM whose first layers run two branches over one block table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import AutoWeightsLoader
from vllm.sequence import IntermediateTensors

from fmd_ext.config import FMDConfig
from fmd_ext.serve.tokens import ReservedIds


class BranchedAttention(nn.Module):
    """Attention of both branches: the layer's own cache for the visual branch, a second one for the audio branch.

    A second layer of the same kind, to vLLM: it allocates, finds and frees the blocks of both together.
    """

    def __init__(self, visual_branch: Attention, vllm_config: VllmConfig) -> None:
        super().__init__()
        self.visual_branch = visual_branch
        self.audio_branch = Attention(
            visual_branch.num_heads,
            visual_branch.head_size,
            visual_branch.impl.scale,
            num_kv_heads=visual_branch.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=visual_branch.quant_config,
            per_layer_sliding_window=visual_branch.sliding_window,
            prefix=f"{visual_branch.layer_name}.audio_branch",
        )

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Rows [2 * tokens, ...]: those of the visual branch, then those of the audio branch."""
        tokens = query.shape[0] // 2
        visual = self.visual_branch(query[:tokens], key[:tokens], value[:tokens])
        audio = self.audio_branch(query[tokens:], key[tokens:], value[tokens:])
        return torch.cat([visual, audio])

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Attention's only weights are scales of quantised keys and values; both branches have the same."""
        weights = list(weights)
        return {
            f"{name}.{loaded}"
            for name, branch in self.named_children()
            for loaded in AutoWeightsLoader(branch).load_weights(weights)
        }


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": {0: "b"},
        "positions": {-1: "b"},
        "intermediate_tensors": {0: "b"},
        "inputs_embeds": {0: "b"},
        "deepstack_input_embeds": {0: "b"},
    }
)
class ForkedDecoder(nn.Module):
    """A decoder with the layers of a plain one, the first ``fork_layers`` of them run for both branches at once.

    The fork layers' rows are [visual branch | audio branch], each of all tokens: norms, projections and MLPs run over
    them in one go, attention by branch. Then the branches are merged, and the rest runs as before.

    Args:
        decoder: vLLM's, with ``layers``, ``norm``, ``embed_tokens``, ``start_layer`` and ``end_layer``.
        settings: resolved, with ``fork_layers`` above 0.
        reserved: tells the labels.
    """

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str = "",
        decoder: nn.Module,
        settings: FMDConfig,
        reserved: ReservedIds,
    ) -> None:
        super().__init__()
        self._plain = (decoder,)  # in a tuple: its modules are ours, under the same names
        self.config = decoder.config
        self.embed_tokens, self.layers, self.norm = decoder.embed_tokens, decoder.layers, decoder.norm
        self.start_layer, self.end_layer = decoder.start_layer, decoder.end_layer
        self.reserved = reserved
        self.fork_layers = settings.fork_layers if get_pp_group().is_first_rank else 0
        self.mask_scale = settings.mask_scale
        self.text_weight, self.visual_weight, alpha_audio, _ = settings.merge_weights
        self.audio_weight = 1.0 - alpha_audio  # all three: of the visual branch
        for layer in self.layers[: self.fork_layers]:
            layer.self_attn.attn = BranchedAttention(layer.self_attn.attn, vllm_config)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self._plain[0].embed_input_ids(input_ids)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return self._plain[0].load_weights(weights)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        deepstack_input_embeds: IntermediateTensors | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """As the plain decoder's; ``input_ids`` [tokens] with reserved ids where a request forks.

        ``positions``: [tokens] or [3, tokens]. ``deepstack_input_embeds``: [tokens, hidden] for each of the first
        layers, added to its output.
        """
        residual: torch.Tensor | None
        if get_pp_group().is_first_rank:
            if inputs_embeds is None:
                inputs_embeds = self.embed_input_ids(self.reserved.restore(input_ids))
            hidden, residual = self._run_branches(input_ids, positions, inputs_embeds, deepstack_input_embeds)
        else:
            hidden, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]

        for index in range(max(self.start_layer, self.fork_layers), self.end_layer):
            hidden, residual = self.layers[index](positions, hidden, residual)
            added = _features(deepstack_input_embeds, index)
            if added is not None:
                hidden = hidden + added
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden, "residual": residual})
        hidden, _ = self.norm(hidden, residual)
        return hidden

    def _run_branches(
        self, input_ids: torch.Tensor, positions: torch.Tensor, embeds: torch.Tensor, deepstack: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The merged hidden states and residual [tokens, hidden] behind the last fork layer."""
        is_visual, is_audio = (label[:, None] for label in self.reserved.labels(input_ids))
        masked_audio = torch.where(is_audio, self.mask_scale, 1.0).to(embeds.dtype)  # factors of the visual branch
        masked_visual = torch.where(is_visual, self.mask_scale, 1.0).to(embeds.dtype)
        hidden = torch.cat([embeds * masked_audio, embeds * masked_visual])
        both_positions = torch.cat([positions, positions], dim=-1)
        residual = None
        for index in range(self.fork_layers):
            hidden, residual = self.layers[index](both_positions, hidden, residual)
            added = _features(deepstack, index)
            if added is not None:
                hidden = hidden + torch.cat([added, added * masked_visual])
        weight = torch.where(is_visual, self.visual_weight, torch.where(is_audio, self.audio_weight, self.text_weight))
        return _merge(hidden, weight), _merge(residual, weight)


def _merge(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The branches' ``rows`` [2 * tokens, hidden] with ``weight`` [tokens, 1] of the visual one; in float32.

    Interpolation, because two equal rows then give exactly that row: a request that masks nothing is not changed.
    """
    visual, audio = rows.float().chunk(2)
    return torch.lerp(audio, visual, weight.float()).to(rows.dtype)


def _features(deepstack: IntermediateTensors | None, layer: int) -> torch.Tensor | None:
    if deepstack is None or layer >= len(deepstack.tensors):
        return None
    return deepstack[f"deepstack_input_embeds_{layer}"]

"""Qwen2.5-Omni's thinker, served with fork-merge decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.model_executor.models.qwen2_5_omni_thinker import (
    Qwen2_5OmniThinkerDummyInputsBuilder,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2_5OmniThinkerMultiModalProcessor,
    Qwen2_5OmniThinkerProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from fmd_ext.serve.thinker import ForkedProcessor, ForkedThinker


class FMDQwen2_5OmniProcessor(ForkedProcessor, Qwen2_5OmniThinkerMultiModalProcessor):
    """vLLM's processor, with reserved ids."""

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        """With the seconds per pair of frames that transformers' processor found: vLLM 0.32 interleaves picture and
        sound as if they were 1.0 whatever the frame rate, while the positions that it gives them follow the rate."""
        seconds = out_mm_kwargs.get_data().get("second_per_grid_ts")
        if seconds is not None:
            found = torch.as_tensor(seconds).flatten().tolist()
            hf_processor_mm_kwargs = {**hf_processor_mm_kwargs, "second_per_grid_ts": found}
        return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)


@MULTIMODAL_REGISTRY.register_processor(
    FMDQwen2_5OmniProcessor,
    info=Qwen2_5OmniThinkerProcessingInfo,
    dummy_inputs=Qwen2_5OmniThinkerDummyInputsBuilder,
)
class FMDQwen2_5OmniForConditionalGeneration(ForkedThinker, Qwen2_5OmniThinkerForConditionalGeneration):
    """vLLM's thinker, with a forked decoder."""

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[torch.Tensor, int]:
        """Positions [3, tokens] and what generated tokens add to their index, as transformers' model has them.

        vLLM 0.32 counts a clip with interleaved sound from its first marker instead of from its first frame, so that
        each of its tokens gets the next one's position. The two markers before a clip share one position, and so do
        the two behind it.
        """
        positions, delta = super().get_mrope_input_positions(input_tokens, mm_features)
        for offset, modality, data in self.iter_mm_features(mm_features):  # in their order
            if modality != "video" or not data["use_audio_in_video"]:
                continue
            _, count = self._compute_interleaved_positions(0, data)
            clip = positions[:, offset : offset + count].clone()
            end = offset + 1 + count
            positions[:, offset] = positions[:, offset - 1]
            positions[:, offset + 1 : end] = clip
            positions[:, end] = clip.max() + 1
            positions[:, end + 1 :] -= 2
            delta -= 2
        return positions, delta

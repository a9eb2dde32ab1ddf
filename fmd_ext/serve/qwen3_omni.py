"""Qwen3-Omni's thinker, served with fork-merge decoding."""

from __future__ import annotations

from vllm.model_executor.models.qwen3_omni_moe_thinker import (
    Qwen3OmniMoeThinkerDummyInputsBuilder,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3OmniMoeThinkerMultiModalProcessor,
    Qwen3OmniMoeThinkerProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from fmd_ext.serve.thinker import ForkedProcessor, ForkedThinker


class FMDQwen3OmniMoeProcessor(ForkedProcessor, Qwen3OmniMoeThinkerMultiModalProcessor):
    """vLLM's processor, with reserved ids."""


@MULTIMODAL_REGISTRY.register_processor(
    FMDQwen3OmniMoeProcessor,
    info=Qwen3OmniMoeThinkerProcessingInfo,
    dummy_inputs=Qwen3OmniMoeThinkerDummyInputsBuilder,
)
class FMDQwen3OmniMoeForConditionalGeneration(ForkedThinker, Qwen3OmniMoeThinkerForConditionalGeneration):
    """vLLM's thinker, with a forked decoder."""

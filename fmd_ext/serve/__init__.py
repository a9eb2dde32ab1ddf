"""Fork-merge decoding within vLLM: a plugin, so that vLLM's own batching, caches, parallelism and server do the rest.

vLLM finds `register` by the entry point ``vllm.general_plugins``. It adds two architectures under names of their own;
models that do not ask for them are served as before.
"""

from __future__ import annotations

# vLLM's architecture -> the same model with fork-merge decoding: the name to ask for, and where its class is.
ARCHITECTURES = {
    "Qwen2_5OmniForConditionalGeneration": (
        "FMDQwen2_5OmniForConditionalGeneration",
        "fmd_ext.serve.qwen2_5_omni:FMDQwen2_5OmniForConditionalGeneration",
    ),
    "Qwen3OmniMoeForConditionalGeneration": (
        "FMDQwen3OmniMoeForConditionalGeneration",
        "fmd_ext.serve.qwen3_omni:FMDQwen3OmniMoeForConditionalGeneration",
    ),
}


def register() -> None:
    """Makes the architectures known to vLLM, which calls this in each of its processes, sometimes more than once.

    Classes are named, not imported: nothing of a model is loaded before somebody asks for it.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    from fmd_ext.serve.settings import CheckedConfig

    for name, place in ARCHITECTURES.values():
        ModelRegistry.register_model(name, place)
        MODELS_CONFIG_MAP[name] = CheckedConfig

"""Which class answers in text for a checkpoint, by what its ``config.json`` says."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from transformers import PreTrainedConfig

# "module:class", by the configuration's model_type; by the architecture that it names, where published configurations
# borrow another model's type. Of the full omni models only the thinker is loaded: the talker and the speech decoder
# would take memory for nothing.
MODEL_CLASSES = {
    "qwen2_5_omni": "transformers:Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen2_5_omni_thinker": "transformers:Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe": "transformers:Qwen3OmniMoeThinkerForConditionalGeneration",
    "qwen3_omni_moe_thinker": "transformers:Qwen3OmniMoeThinkerForConditionalGeneration",
    "video_salmonn": "fmd_ext.models.video_salmonn:VideoSalmonnForConditionalGeneration",
    "video_salmonn_2": "fmd_ext.models.video_salmonn2:VideoSalmonn2ForConditionalGeneration",
    "video_salmonn2_plus": "fmd_ext.models.video_salmonn2_plus:VideoSalmonn2PlusForConditionalGeneration",
    "video_SALMONN2_plus": "fmd_ext.models.video_salmonn2_plus:VideoSalmonn2PlusForConditionalGeneration",
    "videollama2_qwen2": "fmd_ext.models.videollama2:VideoLlama2Qwen2ForConditionalGeneration",
    "videollama2_mistral": "fmd_ext.models.videollama2:VideoLlama2MistralForConditionalGeneration",
}


def read_config(source: str) -> dict[str, Any]:
    """``config.json`` of a folder or hub name, as it is: no code that a checkpoint brings along runs.

    Raises OSError where there is none, or none that can be read.
    """
    return PreTrainedConfig.get_config_dict(source)[0]


def class_for(config: dict[str, Any]) -> type:
    """The class whose ``from_pretrained`` loads the checkpoint of this ``config.json``.

    Its attribute ``processor_class``, where it has one, loads the processor; elsewhere ``AutoProcessor`` does.

    Raises:
        ValueError: a type that is not supported; the message lists those that are.
        ImportError: a library is not installed that the class or its processor needs.
    """
    kinds = (*(config.get("architectures") or ()), config.get("model_type"))
    named = next((MODEL_CLASSES[kind] for kind in kinds if kind in MODEL_CLASSES), None)
    if named is None:
        raise ValueError(
            f"it is of type {config.get('model_type')!r}; supported types are {', '.join(sorted(MODEL_CLASSES))}"
        )
    module, _, name = named.partition(":")
    if module == "transformers" and importlib.util.find_spec("torchvision") is None:
        raise ImportError(
            "transformers processes video by torchvision, which is not installed: pip install 'fmd-ext[omni]'"
        )
    return getattr(importlib.import_module(module), name)

"""Which class answers in text for a checkpoint, by what its ``config.json`` says.

An installed package can bring more: an entry point of the group ``fmd_ext.models`` has the model type (or
architecture) as its name and the class as its value.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any

from transformers import PreTrainedConfig

from fmd_ext.torchvision_mend import torchvision_advice

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


ENTRY_POINTS = "fmd_ext.models"


def read_config(source: str) -> dict[str, Any]:
    """``config.json`` of a folder or hub name, as it is: no code that a checkpoint brings along runs.

    Raises OSError where there is none, or none that can be read.
    """
    return PreTrainedConfig.get_config_dict(source)[0]


def class_for(config: dict[str, Any]) -> Any:
    """What loads the checkpoint of this ``config.json``: the class, or whatever has its ``from_pretrained``.

    ``from_pretrained(source, dtype=..., output_loading_info=True)`` returns the model and a report with
    ``missing_keys``; it gets ``device_map`` where accelerate places the layers. An attribute ``processor_class`` loads
    the processor; without it ``AutoProcessor`` does.

    Raises:
        ValueError: a type that is not supported; the message lists those that are.
        ImportError: a library is not installed that the class or its processor needs.
    """
    kinds = [kind for kind in (*(config.get("architectures") or ()), config.get("model_type")) if kind]
    named = next((MODEL_CLASSES[kind] for kind in kinds if kind in MODEL_CLASSES), None)
    if named is None:
        return _installed_class(kinds, config.get("model_type"))
    module, _, name = named.partition(":")
    if module == "transformers" and importlib.util.find_spec("torchvision") is None:
        raise ImportError(
            f"transformers processes video by torchvision, which is not installed: {torchvision_advice()}"
        )
    return getattr(importlib.import_module(module), name)


def _installed_class(kinds: list[str], model_type: str | None) -> Any:
    points = {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    for kind in kinds:
        if kind in points:
            try:
                return points[kind].load()
            except Exception as error:  # whatever another package's module raises
                raise ImportError(f"{points[kind].value}, which loads {kind}, cannot be imported: {error}") from error
    supported = ", ".join(sorted({*MODEL_CLASSES, *points}))
    raise ValueError(f"it is of type {model_type!r}; supported types are {supported}")

"""Published checkpoints of video-SALMONN 2+: the names of their tensors, and LoRA weights merged into a model.

A full checkpoint loads by ``from_pretrained``. Where the authors publish LoRA weights only, they belong to the
audio-aligned model of the same size: load that, then `merge_adapter`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from fmd_ext.models.loading import merge_lora, some

# Official name -> ours, as transformers has it for Qwen2.5-VL; saving turns them round.
_RENAMES = (
    (r"^visual", "model.visual"),
    (r"^audio", "model.audio"),
    (r"^model(?!\.(language_model|visual|audio))", "model.language_model"),
)
# What changes how LoRA weights are merged.
_VARIANTS = ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern", "fan_in_fan_out", "lora_bias")


def register_names(model_class: type[PreTrainedModel]) -> None:
    """Tells transformers how the tensors of ``model_class`` are called in published checkpoints."""
    renames = [WeightRenaming(source_patterns=source, target_patterns=target) for source, target in _RENAMES]
    register_checkpoint_conversion_mapping(model_class.__name__, renames, overwrite=True)


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Merges LoRA weights into a model, and replaces the parts that were trained whole beside them.

    Args:
        model: the model that the adapter was trained on, in memory; it is changed.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT saves it.

    Raises:
        FileNotFoundError: one of the files is not there.
        ValueError: another kind of adapter, or one that lacks weights or has such as the model has not; they are named.
    """
    folder = Path(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    variants = [name for name in _VARIANTS if settings.get(name)]
    if settings.get("peft_type") != "LORA" or variants:
        kind = f"{settings.get('peft_type')}{''.join(f', {name}' for name in variants)}"
        raise ValueError(f"{folder} holds another adapter than plain LoRA: {kind}")
    weights = model.state_dict()
    if any(tensor.is_meta for tensor in weights.values()):
        raise ValueError("an adapter is merged into a model in memory, and parts of this one are fetched when needed")
    given = {our_name(name): tensor for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    lora = {name: tensor for name, tensor in given.items() if ".lora_" in name}
    whole = {name: tensor for name, tensor in given.items() if name not in lora and not _is_unused(model, name)}
    targets = sorted({re.sub(r"\.lora_.*", ".weight", name) for name in lora})
    faults = [name for name in targets if name not in weights]
    faults += [name for name, tensor in whole.items() if name not in weights or weights[name].shape != tensor.shape]
    if faults:
        raise ValueError(f"{folder} does not fit the model in {len(faults)} tensors: {some(faults)}")
    decoder = {name: tensor for name, tensor in weights.items() if name.startswith("model.language_model.layers.")}
    state = {name.removeprefix("model."): tensor for name, tensor in {**decoder, **lora}.items()}
    merged = merge_lora(state, settings["lora_alpha"], str(folder))
    for name in targets:
        weights[name].copy_(merged[name.removeprefix("model.")])
    for name, tensor in whole.items():
        weights[name].copy_(tensor)


def our_name(name: str) -> str:
    name = name.removeprefix("base_model.model.")
    for source, target in _RENAMES:
        name = re.sub(source, target, name)
    return name


def _is_unused(model: PreTrainedModel, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected)

"""Checkpoints that do not fit are refused, where transformers would fill the holes with random weights; LoRA merged."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

_LORA = re.compile(r"^(language_model\.layers\.\d+\.\w+\.\w+)\.lora_([AB])\.(?:\w+\.)?weight$")


class CompleteCheckpoints:
    """A base in front of `PreTrainedModel`: ``from_pretrained`` raises ValueError for missing or unfit tensors."""

    @classmethod
    def from_pretrained(
        cls,
        source: Any,
        *args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        # Unfit shapes are reported instead of raised, so that the error can name them.
        model, report = super().from_pretrained(
            source, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        missing = sorted(report["missing_keys"])
        if missing:
            others = sorted(report["unexpected_keys"])
            hint = f"; it holds {len(others)} others, such as {others[0]}" if others else ""
            raise ValueError(
                f"{source} is no complete {cls.__name__}: it lacks {len(missing)} tensors: {some(missing, 5)}{hint}"
            )
        unfit = sorted(
            f"{name} is {list(has)} instead of {list(wants)}" for name, has, wants in report["mismatched_keys"]
        )
        if unfit and not ignore_mismatched_sizes:
            raise ValueError(
                f"{source} does not fit its configuration in the shape of {len(unfit)} tensors: {some(unfit, 5)}"
            )
        return (model, report) if output_loading_info else model


def merge_lora(state: dict[str, torch.Tensor], alpha: float, file: str) -> dict[str, torch.Tensor]:
    """Adds ``alpha / rank * B @ A`` to the decoder's weights.

    Raises ValueError when LoRA weights are missing: none at all, half a pair, or a layer without.
    """
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    rest: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        found = _LORA.match(name)
        if found:
            pairs.setdefault(found[1], {})[found[2]] = tensor
        else:
            rest[name.replace(".base_layer.", ".")] = tensor
    layers = {name.split(".")[2] for name in rest if name.startswith("language_model.layers.")}
    kinds = {name.split(".", 3)[3] for name in pairs}
    expected = {f"language_model.layers.{layer}.{kind}" for layer in layers for kind in kinds}
    missing = [f"{name}.lora_{half}" for name in sorted(expected) for half in "AB" if half not in pairs.get(name, {})]
    if missing or not pairs:
        raise ValueError(f"{file} lacks LoRA weights: {some(missing) if pairs else 'it has none'}")
    for name, pair in pairs.items():
        weight = rest.get(f"{name}.weight")
        if weight is None:
            continue  # named by the check of the whole state
        change = pair["B"].float() @ pair["A"].float() * (alpha / len(pair["A"]))
        rest[f"{name}.weight"] = (weight.float() + change).to(weight.dtype)
    return rest


def some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

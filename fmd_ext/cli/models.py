"""Loads a model and its processor, from a folder, the hub, or from the package itself."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging as transformers_logging

from fmd_ext.adapters import find_adapter
from fmd_ext.cli.errors import UserError, blaming_input
from fmd_ext.config import FMDConfig

RANDOM_MARK = "random_weights"  # an entry of a configuration: these weights were never trained

# The class that answers in text ("module:class"), by the configuration's model_type; by the architecture that it names,
# where published configurations borrow another model's type. Of the full omni models only the thinker is loaded: the
# talker and the speech decoder would take memory for nothing.
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


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with its processor.

    ``is_random``: its weights were never trained. ``settings``: of fork-merge decoding, where the model brings some.
    """

    model: Any
    processor: Any
    name: str
    is_random: bool
    settings: FMDConfig = FMDConfig()

    @property
    def context_limit(self) -> int | None:
        """Positions that the text decoder was made for."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def load_model(source: str | None, dtype: str = "auto", device: str = "auto") -> LoadedModel:
    """Loads ``source`` (folder or hub name), or the small trained model of the package when it is None.

    The latter sets torch to one thread: it is so small that threads would wait for each other (with two, three times
    the work).

    Raises UserError for a model that is not there, is not supported, or lacks weights, and for an unusable device.
    """
    target = _device(device)
    if source is not None:
        if _is_path(source) and not Path(source).is_dir():
            raise UserError(f"model {source}: there is no such folder")
        return _load(source, source, dtype, target)
    trained = lab_module("trained", "the built-in model")
    with _no_progress_bars():
        torch.set_num_threads(1)
        loaded = _load(str(trained.MODEL), "built-in model, trained on synthetic clips", dtype, target)
    return dataclasses.replace(loaded, settings=FMDConfig.from_file(trained.SETTINGS))


def lab_module(name: str, what: str) -> Any:
    """``fmd_ext.lab.<name>``, found by name: the library works where the lab is not installed.

    Raises UserError saying that ``what`` belongs to the lab.
    """
    if importlib.util.find_spec("fmd_ext.lab") is None:
        raise UserError(f"{what} belongs to fmd_ext.lab, which is not part of this installation")
    return importlib.import_module(f"fmd_ext.lab.{name}")


def _load(source: str, name: str, dtype: str, device: torch.device | None) -> LoadedModel:
    ports = importlib.import_module("fmd_ext.models")  # makes our ports known to transformers
    torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    placement = {"device_map": "auto"} if device is None else {}
    if ports.video_salmonn.is_official_folder(source):
        with blaming_input(OSError, ValueError, ImportError, prefix=f"model {name}: "), _no_load_report():
            model, processor = ports.video_salmonn.load_official(source, dtype=torch_dtype, **placement)
        return LoadedModel(model if device is None else model.to(device), processor, name, False)
    with blaming_input(OSError, ValueError, prefix=f"model {name}: "):
        config = transformers.AutoConfig.from_pretrained(source)
    kind = next((name for name in config.architectures or () if name in MODEL_CLASSES), config.model_type)
    if kind not in MODEL_CLASSES:
        raise UserError(
            f"model {name} is of type {config.model_type!r}; supported types are {', '.join(sorted(MODEL_CLASSES))}"
        )
    module, _, class_name = MODEL_CLASSES[kind].partition(":")
    if module == "transformers" and importlib.util.find_spec("torchvision") is None:
        raise UserError(
            "transformers processes video by torchvision, which is not installed: pip install 'fmd-ext[omni]'"
        )
    model_class = getattr(importlib.import_module(module), class_name)
    processor_class = getattr(model_class, "processor_class", transformers.AutoProcessor)
    with blaming_input(OSError, ValueError, ImportError, prefix=f"processor of {name}: "):
        processor = processor_class.from_pretrained(source)
    with blaming_input(OSError, ValueError, prefix=f"weights of {name}: "), _no_load_report():
        model, report = model_class.from_pretrained(source, dtype=torch_dtype, output_loading_info=True, **placement)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"the weights of {name} lack {len(missing)} tensors, among them {missing[0]}")
    find_adapter(model)  # a class that we load is one that we can patch
    if device is not None:
        model.to(device)
    return LoadedModel(model.eval(), processor, name, bool(getattr(config, RANDOM_MARK, False)))


def _is_path(source: str) -> bool:
    """A hub name is ``owner/name`` or ``name``."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source


def _device(name: str) -> torch.device | None:
    """The one device for the whole model; None: accelerate spreads its layers."""
    if name == "spread":
        if importlib.util.find_spec("accelerate") is None:
            raise UserError("device 'spread' is the work of accelerate, which is not installed: pip install accelerate")
        return None
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|(cuda|xpu)(:\d+)?", name):
        raise UserError(f"device {name!r}: accepted are auto, cpu, cuda, cuda:N, xpu, mps and spread")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r}: torch {torch.__version__} sees no CUDA device here")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device {name!r}: torch {torch.__version__} sees no such device here")
    if device.type == "xpu" and not torch.xpu.is_available():
        raise UserError(f"device {name!r}: torch {torch.__version__} sees no such device here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices")
    return device


@contextlib.contextmanager
def _no_load_report() -> Iterator[None]:
    """transformers lists every tensor of the talker that the thinker does not take; we report what is missing."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """The built-in model is there in less than a second."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()

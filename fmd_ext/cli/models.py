"""Loads a model and its processor, from a folder, the hub, or from the package itself."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import queue
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub import utils as hub_utils
from transformers.utils import logging as transformers_logging

from fmd_ext.adapters import find_adapter
from fmd_ext.cli.errors import UserError, blaming_input
from fmd_ext.config import FMDConfig

HUB_SECONDS = 5  # that the hub has to answer in
RANDOM_MARK = "random_weights"  # an entry of a configuration: these weights were never trained


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
        if is_path(source) and not Path(source).is_dir():
            raise UserError(f"model {source}: there is no such folder")
        with _progress_bars(sys.stderr.isatty()), reachable(source):
            return _load(source, source, dtype, target)
    trained = lab_module("trained", "the built-in model")
    with _progress_bars(False):  # it is there in less than a second
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
    with blaming_input(OSError, ValueError, ImportError, prefix=f"model {name}: "):
        config = ports.classes.read_config(source)
        model_class = ports.classes.class_for(config)
    processor_class = getattr(model_class, "processor_class", transformers.AutoProcessor)
    with blaming_input(OSError, ValueError, ImportError, prefix=f"processor of {name}: "):
        processor = processor_class.from_pretrained(source)
    # A quantisation whose library is missing is an ImportError; one that does not run here may be a RuntimeError.
    with (
        blaming_input(OSError, ValueError, ImportError, RuntimeError, prefix=f"weights of {name}: "),
        _no_load_report(),
    ):
        model, report = model_class.from_pretrained(source, dtype=torch_dtype, output_loading_info=True, **placement)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"the weights of {name} lack {len(missing)} tensors, among them {missing[0]}")
    find_adapter(model)  # a class that we load is one that we can patch
    if device is not None:
        model.to(device)
    return LoadedModel(model.eval(), processor, name, bool(config.get(RANDOM_MARK, False)))


def is_path(source: str) -> bool:
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
def _progress_bars(wanted: bool) -> Iterator[None]:
    """Whether transformers and the hub's client show how far they are."""
    was_on = transformers_logging.is_progress_bar_enabled()
    hub_was_off = hub_utils.are_progress_bars_disabled()
    if not wanted:
        transformers_logging.disable_progress_bar()
        hub_utils.disable_progress_bars()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()
        if not hub_was_off:
            hub_utils.enable_progress_bars()


@contextlib.contextmanager
def reachable(source: str) -> Iterator[None]:
    """Within this context a model of the hub is downloaded, or taken from the cache at once where there is no network.

    The hub's client alone tries each file again and again, for over a minute.

    Raises UserError where neither the hub nor the cache has it.
    """
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    reason = "" if Path(source).is_dir() or offline else _why_unreachable()
    if not reason:
        yield
        return
    if not isinstance(huggingface_hub.try_to_load_from_cache(source, "config.json"), str):
        raise UserError(f"model {source}: no such folder, not in the cache, and the hub cannot be reached: {reason}")
    print(f"note: the hub cannot be reached ({reason}): {source} comes from the cache", file=sys.stderr)
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = offline


def _why_unreachable() -> str:
    """Why the hub does not answer within seconds; "" if it does. In a thread: looking up a name knows no timeout."""
    answers: queue.Queue[str] = queue.Queue()

    def ask() -> None:
        try:
            endpoint = huggingface_hub.constants.ENDPOINT
            status = hub_utils.get_session().head(endpoint, timeout=HUB_SECONDS).status_code
            answers.put(f"it answers with status {status}" if status >= 500 else "")
        except Exception as error:  # of the client's HTTP library, which differs between its versions
            answers.put(str(error) or type(error).__name__)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=HUB_SECONDS)
    except queue.Empty:
        return f"no answer within {HUB_SECONDS} s"

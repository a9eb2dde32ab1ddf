"""``fmd-ext doctor``: what is installed, which code each op runs here and why, and what is wrong."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from fmd_ext.hardware import cpu_model

SUPPORTED_TORCH = (2, 10)
SUPPORTED_TRANSFORMERS = (5, 17)
PACKAGES = ("torch", "transformers", "torchvision", "tokenizers", "av", "numpy")


def run(args: argparse.Namespace) -> int:
    report = examine()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 1 if report["problems"] else 0


def examine() -> dict[str, Any]:
    """All facts, as JSON would hold them. ``problems`` keep the extension from running, ``warnings`` do not."""
    report: dict[str, Any] = {"problems": [], "warnings": []}
    report["versions"] = _versions(report)
    report["cpu"] = {
        "model": cpu_model(),
        "machine": platform.machine(),
        "torch_sees": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    report["gpus"] = [
        {
            "name": device.name,
            "memory_gib": round(device.total_memory / 2**30, 1),
            "capability": f"{device.major}.{device.minor}",
        }
        for device in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]
    report["torch_cuda"] = torch.version.cuda
    report["build"] = _build(report)
    report["libraries"] = _libraries(report)
    report["ops"] = _ops(report) if not report["problems"] else []
    report["decode_runner"] = _decode_runner(report)
    return report


def _versions(report: dict[str, Any]) -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("fmd-ext", *PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    if versions["fmd-ext"] is None:  # imported from its sources
        import fmd_ext

        versions["fmd-ext"] = f"{fmd_ext.__version__} (not installed, run from {Path(fmd_ext.__file__).parent})"
    versions["torch"] = torch.__version__  # with the +cpu or +cu130 that the metadata may lack
    for package, least in (("torch", SUPPORTED_TORCH), ("transformers", SUPPORTED_TRANSFORMERS)):
        wanted = ".".join(map(str, least))
        if versions[package] is None:
            report["problems"].append(f"{package} is not installed; {wanted} or newer is needed")
        elif tuple(int(part) for part in versions[package].split(".")[:2]) < least:
            report["problems"].append(f"{package} {versions[package]} is too old; {wanted} or newer is needed")
    if versions["torchvision"] is None:
        report["warnings"].append(
            "torchvision is not installed, and transformers needs it for video: pip install 'fmd-ext[omni]'"
        )
    if versions["av"] is None:
        report["warnings"].append("PyAV (package av) is not installed: clips cannot be read")
    from fmd_ext.compat import mend_torchvision

    if mend_torchvision() == "declared":
        versions["torchvision"] = f"{versions['torchvision']} (its own ops do not load beside this torch; mended)"
    return versions


def _build(report: dict[str, Any]) -> dict[str, Any] | None:
    try:
        from fmd_ext import _core
    except ImportError as error:
        report["problems"].append(f"the planner module fmd_ext._core cannot be imported: {_one_line(error)}")
        return None
    return dict(_core.build_info())


def _libraries(report: dict[str, Any]) -> list[dict[str, Any]]:
    from fmd_ext.ops import library

    try:
        found = library.load()
    except (ImportError, ValueError, OSError) as error:
        report["problems"].append(_one_line(error))
        return []
    if torch.cuda.is_available() and not found["cuda"].loaded:
        report["warnings"].append(f"there is a GPU, and no kernel of fmd_ext runs on it: {found['cuda'].reason}")
    return [
        {"device": lib.device, "path": str(lib.path), "loaded": lib.loaded, "reason": lib.reason}
        for lib in found.values()
    ]


def _ops(report: dict[str, Any]) -> list[dict[str, Any]]:
    from fmd_ext.cli import doctor_ops

    return doctor_ops.examine(report["problems"])


def _decode_runner(report: dict[str, Any]) -> dict[str, Any]:
    """Whether a patched model's ``generate`` replays CUDA graphs here when nothing else is said, and why."""
    loaded = any(lib["device"] == "cuda" and lib["loaded"] for lib in report["libraries"])
    if report["gpus"] and loaded:
        return {"on_by_default": True, "why": "models on a GPU that fork; handle.runner.last tells it of each call"}
    lacking = "the CUDA op library is not loaded" if report["gpus"] else "torch sees no CUDA device"
    return {"on_by_default": False, "why": f"{lacking}; patch(model, runner=True) runs it without graphs"}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _print(report: dict[str, Any]) -> None:
    def section(title: str, rows: list[tuple[str, Any]]) -> None:
        print(title)
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            print(f"  {name:<{width}}  {value}")

    section("versions", [(name, version or "not installed") for name, version in report["versions"].items()])
    cpu, gpus = report["cpu"], report["gpus"]
    cores = f"{cpu['cores']} cores, torch uses {cpu['threads']} threads"
    machine = [("cpu", f"{cpu['model']} ({cpu['machine']}), {cores}"), ("torch's cpu path", cpu["torch_sees"])]
    for gpu in gpus:
        machine.append(("gpu", f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['capability']}"))
    if not gpus:
        machine.append(("gpu", f"none that torch sees (torch's CUDA: {report['torch_cuda'] or 'none'})"))
    section("machine", machine)
    if report["build"]:
        section("build", [(name, _plain(value)) for name, value in report["build"].items() if value not in ("", [])])
    section("op libraries", [(lib["device"], _library_line(lib)) for lib in report["libraries"]])
    section("ops", [(f"{op['op']} ({op['device']})", _op_line(op)) for op in report["ops"]])
    runner = report["decode_runner"]
    section("decode runner", [("by default", f"{'on' if runner['on_by_default'] else 'off'}: {runner['why']}")])
    for warning in report["warnings"]:
        print(f"warning: {warning}")
    for problem in report["problems"]:
        print(f"problem: {problem}")
    if not report["problems"]:
        print("all is well: the extension can run")


def _library_line(library: dict[str, Any]) -> str:
    return library["path"] if library["loaded"] else f"not loaded: {library['reason']}"


def _op_line(op: dict[str, Any]) -> str:
    from fmd_ext.cli import doctor_ops

    return doctor_ops.line(op)


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

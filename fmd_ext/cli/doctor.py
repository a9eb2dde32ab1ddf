"""``fmd-ext doctor``: what is installed, which code each op runs here and why, and what is wrong."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import fmd_ext
from fmd_ext import compat
from fmd_ext.config import MASKINGS
from fmd_ext.hardware import cpu_model
from fmd_ext.serve import environment
from fmd_ext.torchvision_mend import mend_torchvision, torchvision_advice

SUPPORTED_TORCH = (2, 10)
PACKAGES = ("torch", "transformers", "torchvision", "tokenizers", "av", "numpy")
REBUILD = "build again (pip install, or the script that you use)"
SOURCES = Path(fmd_ext.__file__).resolve().parents[1]  # where fmd_ext runs from the folder of its sources


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
    _driver(report)
    report["build"] = _build(report)
    report["libraries"] = _libraries(report)
    report["ops"] = _ops(report) if report["libraries"] else []
    report["forked_calls"] = _forked_calls(report)
    report["decode_runner"] = _decode_runner(report)
    environment.examine(report)
    return report


def _driver(report: dict[str, Any], file: Path = Path("/proc/driver/nvidia/version")) -> None:
    if torch.version.cuda and not report["gpus"] and file.exists():
        report["warnings"].append(
            f"there is an NVIDIA driver, but torch {torch.__version__} sees no GPU: it is built for CUDA "
            f"{torch.version.cuda}, which may need a newer driver (torch 2.15 is built for CUDA 13.2)"
        )


def _versions(report: dict[str, Any]) -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("fmd-ext", *PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    if versions["fmd-ext"] is None:  # imported from its sources
        versions["fmd-ext"] = f"{fmd_ext.__version__} (not installed, run from {Path(fmd_ext.__file__).parent})"
    versions["torch"] = torch.__version__  # with the +cpu or +cu130 that the metadata may lack
    if _numbers(torch.__version__) < SUPPORTED_TORCH:
        report["problems"].append(
            f"torch {torch.__version__} is too old; {_dotted(SUPPORTED_TORCH)} or newer is needed"
        )
    try:
        if said := compat.check_transformers():
            report["warnings"].append(said)
    except ImportError as error:
        report["problems"].append(_one_line(error))
    if versions["torchvision"] is None:
        report["warnings"].append(
            f"torchvision is not installed, and transformers needs it for video: {torchvision_advice()}"
        )
    if versions["av"] is None:
        report["warnings"].append("PyAV (package av) is not installed: clips cannot be read")
    if mend_torchvision() == "declared":
        versions["torchvision"] = f"{versions['torchvision']} (its own ops do not load beside this torch; mended)"
    return versions


def _build(report: dict[str, Any]) -> dict[str, Any] | None:
    """How the compiled parts were built, or why there are none; and whether they still fit what is here."""
    try:
        from fmd_ext import _core
    except ImportError as error:
        return _uncompiled(report, error)
    facts = {"compiled": True, **_core.build_info()}
    if facts["version"] != fmd_ext.__version__:
        report["warnings"].append(
            f"the compiled parts are of fmd_ext {facts['version']}, the rest of {fmd_ext.__version__}: {REBUILD}"
        )
    report["warnings"] += _misfits(facts, torch.__version__, torch.version.cuda)
    if changed := _changed_since_built(facts):
        report["warnings"].append(f"the libraries are older than their source {changed}: {REBUILD}")
    return facts


def _uncompiled(report: dict[str, Any], error: ImportError) -> dict[str, Any] | None:
    """The facts of a build without compiled parts: all is well, and slower. None where such parts should be there."""
    from fmd_ext.ops import library

    try:
        reason = library.why_not_compiled()
    except ImportError as damaged:
        report["problems"].append(_one_line(damaged))
        return None
    if not reason:
        report["problems"].append(f"the planner module fmd_ext._core cannot be imported: {_one_line(error)}")
        return None
    advice = "; with one, pip install --force-reinstall --no-deps --no-cache-dir compiles"
    report["warnings"].append(reason + (advice if "no C++ compiler" in reason else ""))
    return {"compiled": False, "reason": reason}


def _misfits(facts: dict[str, Any], installed: str, installed_cuda: str | None) -> list[str]:
    """Where the installed torch is not one that the compiled parts were made for.

    What is built against one torch runs in every later one, and in earlier ones back to the stable ABI level that it
    asks for (``torch_target_version``: a byte each of major and minor first).
    """
    found = []
    target = int(facts["torch_target_version"], 16)
    least = (target >> 56, target >> 48 & 0xFF)
    if _numbers(installed) < least:
        found.append(
            f"the op libraries, built against torch {facts['torch_version']}, run in torch {_dotted(least)} and later, "
            f"and {installed} is installed: {REBUILD}"
        )
    built_cuda = facts["cuda_compiler"]
    if built_cuda and installed_cuda and _numbers(built_cuda)[0] > _numbers(installed_cuda)[0]:
        found.append(
            f"the CUDA library was compiled by CUDA {built_cuda}, the installed torch is for CUDA {installed_cuda}: a "
            f"driver that is too old for the former will not run it; {REBUILD} with the toolkit of the latter"
        )
    return found


def _changed_since_built(facts: dict[str, Any]) -> str:
    """The newest C++ source, if it was written after the newest compiled part was; "" where sources lie elsewhere."""
    files = [path for folder in ("csrc", "python") for path in (SOURCES / folder).rglob("*.*") if path.is_file()]
    if not facts["cuda"]:
        files = [path for path in files if "cuda" not in str(path.relative_to(SOURCES))]
    built = [*(SOURCES / "fmd_ext" / "lib").glob("*.so"), *(SOURCES / "fmd_ext").glob("_core.*")]
    if not files or not built:
        return ""
    newest = max(files, key=lambda path: path.stat().st_mtime)
    is_older = max(path.stat().st_mtime for path in built) < newest.stat().st_mtime
    return str(newest.relative_to(SOURCES)) if is_older else ""


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _libraries(report: dict[str, Any]) -> list[dict[str, Any]]:
    from fmd_ext.ops import library

    try:
        found = library.load()
    except (ImportError, ValueError, OSError) as error:
        if report["build"] is None or report["build"]["compiled"]:
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


def _forked_calls(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A forked call of a small random model with either masking on every device, held to two plain passes."""
    if report["problems"]:
        return []  # told already; a call would fail of the same cause, or not at all by chance
    try:
        from fmd_ext.cli.forked_call import forked_call
    except Exception as error:  # whatever the installed transformers lacks
        report["problems"].append(f"forked calls cannot run here: {type(error).__name__}: {_one_line(error)}")
        return []
    calls = []
    devices = ["cpu", *(name for name in ("cuda", "xpu", "mps") if getattr(torch, name).is_available())]
    for device in devices:
        for masking in MASKINGS:
            dtype = torch.bfloat16 if device == "cuda" else torch.float32  # which the CUDA kernels do not take
            entry = {"device": device, "masking": masking, "dtype": str(dtype).removeprefix("torch.")}
            calls.append(entry)
            try:
                outcome = forked_call(masking, torch.device(device), dtype)
            except Exception as error:  # whatever is broken, the report goes on
                entry["check"] = f"{type(error).__name__}: {_one_line(error)}"
                report["problems"].append(f"a forked call on {device}, masking {masking}, fails: {entry['check']}")
                continue
            entry |= {**dataclasses.asdict(outcome), "is_right": outcome.is_right}
            if not outcome.is_right:
                report["problems"].append(
                    f"a forked call on {device}, masking {masking}, gives a wrong result: logits off by "
                    f"{outcome.error:.1e} from two plain passes, {outcome.allowed:.1e} is allowed; greedy tokens off "
                    f"the best by {', '.join(f'{shortfall:.1e}' for shortfall in outcome.shortfalls)}"
                )
    return calls


def _decode_runner(report: dict[str, Any]) -> dict[str, Any]:
    """Whether a patched model's ``generate`` decodes over static buffers when nothing else is said, and why."""
    loaded = [lib["device"] for lib in report["libraries"] if lib["loaded"]]
    if not loaded:
        return {"on_by_default": False, "why": "it needs fmd_ext's kernels, and none are loaded"}
    places = "a CPU, without graphs"
    if report["gpus"] and "cuda" in loaded:
        places = f"a GPU, by CUDA graphs, and on {places}"
    return {"on_by_default": True, "why": f"models that fork on {places}; handle.runner.last tells it of each call"}


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
    calls = [(f"{call['masking']} masking ({call['device']})", _call_line(call)) for call in report["forked_calls"]]
    section("forked calls", calls or [("not tried", "see the problems below")])
    fusions = {(name, call["device"]): told for call in report["forked_calls"] for name, told in _fusions(call)}
    section("fusions, in that model", [(f"{name} ({device})", told) for (name, device), told in fusions.items()])
    runner = report["decode_runner"]
    section("decode runner", [("by default", f"{'on' if runner['on_by_default'] else 'off'}: {runner['why']}")])
    section("serving", [("vLLM", environment.in_words(report["serving"]))])
    for warning in report["warnings"]:
        print(f"warning: {warning}")
    for problem in report["problems"]:
        print(f"problem: {problem}")
    if not report["problems"]:
        print("all is well: forked calls run here, and equal two plain passes")


def _library_line(library: dict[str, Any]) -> str:
    return library["path"] if library["loaded"] else f"not loaded: {library['reason']}"


def _op_line(op: dict[str, Any]) -> str:
    from fmd_ext.cli import doctor_ops

    return doctor_ops.line(op)


def _call_line(call: dict[str, Any]) -> str:
    if "is_right" not in call:
        return f"fails: {call['check']}"
    return (
        f"logits differ from two plain passes by {call['error']:.1e} ({call['dtype']}; {call['allowed']:.1e} is "
        f"rounding, forking changes {call['effect']:.1e}); {len(call['shortfalls'])} greedy tokens "
        f"{'as' if call['is_right'] else 'NOT as'} the reference's"
    )


def _fusions(call: dict[str, Any]) -> Iterable[tuple[str, str]]:
    return call.get("fusions", {}).items()


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

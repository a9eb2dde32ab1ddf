#!/usr/bin/env python3
"""Checks what the libraries of a built wheel ask of the machine that loads them. Fails where that is too much.

Usage: scripts/check_wheel.py [--cuda] WHEEL, with the Python whose torch the wheel was built against. --cuda: the CUDA
op library must be in it. Needs a C++ compiler and nm and readelf (binutils).

An op library may use of torch what the headers of the stable ABI declare for torch 2.10, so that every later torch
loads it; the planner module, nothing. None may need a library beyond torch's and the C and C++ runtimes.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "build_backend"))
import fmd_build_tools as tools  # noqa: E402

STABLE_HEADERS = ("torch/csrc/stable/c/shim.h", "torch/csrc/inductor/aoti_torch/c/shim.h")
TORCH_LIBRARIES = {
    "libfmd_ext_cpu.so": {"libtorch_cpu.so"},
    "libfmd_ext_cuda.so": {"libtorch_cpu.so", "libtorch_cuda.so"},
}
RUNTIMES = {
    "libc.so.6",
    "libm.so.6",
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}
RUNTIMES |= {"libdl.so.2", "libpthread.so.0", "librt.so.1"}  # parts of libc where that is older than 2.34


def torch_include() -> Path:
    """Torch's headers, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(f"fmd_ext: no torch is installed for {sys.executable}: its headers say what is stable.")
    return Path(spec.origin).parent / "include"


def stable_symbols() -> set[str]:
    """The functions that torch's headers of the stable ABI declare for our target version."""
    source = "".join(f"#include <{header}>\n" for header in STABLE_HEADERS)
    command = [*tools.require_compiler().command, "-std=c++17", "-E", "-P", "-x", "c++", "-DUSE_CUDA"]
    command += [f"-DTORCH_TARGET_VERSION={tools.TORCH_TARGET_VERSION}", "-I", str(torch_include()), "-"]
    said = subprocess.run(command, input=source, capture_output=True, text=True)
    if said.returncode != 0:
        raise SystemExit(f"fmd_ext: torch's headers of the stable ABI cannot be read:\n{said.stderr}")
    return set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", said.stdout))


def undefined_symbols(library: Path) -> list[str]:
    """What a library takes from others, without what may be absent and what the C and C++ runtimes version."""
    said = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    symbols = [line.split()[:2] for line in said.stdout.splitlines()]  # "U name" or "U name@VERSION"
    return [name for kind, name in symbols if kind == "U" and "@" not in name]


def needed_libraries(library: Path) -> set[str]:
    said = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", said.stdout))


def problems(library: Path, stable: set[str]) -> list[str]:
    """What is wrong with an op library, or the planner module, one sentence each."""
    allowed = TORCH_LIBRARIES.get(library.name, set())
    found = [f"needs {name}" for name in sorted(needed_libraries(library) - RUNTIMES - allowed)]
    is_module = library.name.startswith("_core.")
    for name in undefined_symbols(library):
        is_python = re.match(r"_?Py[A-Z_]\w*$", name) is not None
        if is_python if is_module else name in stable:
            continue
        found.append(f"uses {name}, which is not {'of Python' if is_module else 'of the stable ABI'}")
    return found


def main() -> int:
    arguments = [argument for argument in sys.argv[1:] if argument != "--cuda"]
    if len(arguments) != 1 or not arguments[0].endswith(".whl"):
        raise SystemExit(f"fmd_ext: accepted are [--cuda] and one wheel, got {' '.join(sys.argv[1:]) or 'nothing'}.")
    stable = stable_symbols()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(arguments[0]) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".so")]
        libraries = [Path(wheel.extract(name, folder)) for name in names]
        wrong = {library.name: problems(library, stable) for library in libraries}
        used = {library.name: len(set(undefined_symbols(library)) & stable) for library in libraries}
    expected = {"libfmd_ext_cpu.so"} | ({"libfmd_ext_cuda.so"} if "--cuda" in sys.argv else set())
    missing = expected - wrong.keys() | (set() if any(name.startswith("_core.") for name in wrong) else {"_core.*.so"})
    for name in sorted(missing):
        print(f"fmd_ext: the wheel holds no {name}", file=sys.stderr)
    for name, sentences in wrong.items():
        print(f"{name}: uses {used[name]} of {len(stable)} functions of torch's stable ABI, {len(sentences)} problems")
        for sentence in sentences:
            print(f"fmd_ext: {name} {sentence}", file=sys.stderr)
    return int(bool(missing) or any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Compiles the CUDA kernels and prints what ptxas says of each: registers, spills, stack. Fails where one spills, or
where ptxas takes the overlap out of warpgroup products ("serialized").

Usage: scripts/ptxas_report.py [ARCH ...], by default the architectures of CMakeLists.txt. Needs nvcc, no GPU.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which(
        "nvcc", path="/usr/local/cuda/bin"
    )
    if path is None:
        raise SystemExit(
            "fmd_ext: no nvcc found in CUDA_HOME, on PATH or in /usr/local/cuda: install the CUDA toolkit."
        )
    return path


def cmake_list(name: str) -> list[str]:
    return re.search(rf"set\({name} ([^)]+)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()


def sources(architectures: list[str]) -> list[tuple[str, Path]]:
    """(architecture, source) of all kernels, as CMakeLists.txt builds them."""
    built = [name.split("-")[0] for name in cmake_list("FMD_CUDA_ARCHITECTURES")]
    kernels = ROOT / "csrc" / "cuda"
    pairs = [(name, path) for name in architectures or built for path in sorted((kernels / "sm80").glob("*.cu"))]
    if not architectures or "90a" in architectures:
        pairs += [("90a", path) for path in sorted((kernels / "sm90").glob("*.cu"))]
    return pairs


def kernel_name(mangled: str) -> str:
    """`branched_prefill_kernel<BFloat16, 128>` of a mangled name; template arguments are types and integers only."""
    names = re.findall(r"fmd4cuda\d+([a-z0-9_]+_kernel)", mangled)
    arguments = re.search(r"_kernelI(.*?)EEv", mangled)
    if not names or arguments is None:
        return names[0] if names else mangled
    words = re.findall(r"(?:BFloat16|Float16|Vec16)|(?<=Li)\d+|^[ftj]", arguments[1] + "E")
    named = {"f": "float", "t": "uint16_t", "j": "uint32_t"}
    return f"{names[0]}<{', '.join(named.get(word, word) for word in words)}>"


def report(nvcc: str, source: Path, architecture: str) -> list[tuple[str, int, int, int]]:
    """(kernel, registers, spilled bytes, stack bytes) of every kernel in a source.

    Raises SystemExit where it does not compile, or not as it is meant.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-std=c++17", "-O3", "-cubin", "-Xptxas", "-v", f"-arch=sm_{architecture}"]
        command += ["-I", str(ROOT / "csrc"), "-I", str(ROOT / "csrc" / "include")]
        said = subprocess.run([*command, source, "-o", f"{folder}/x.cubin"], capture_output=True, text=True)
    if said.returncode != 0:
        raise SystemExit(f"fmd_ext: {source.name} does not compile for sm_{architecture}:\n{said.stderr}")
    if "serialized" in said.stderr:
        raise SystemExit(f"fmd_ext: ptxas serializes products in {source.name}:\n{said.stderr}")
    kernels = []
    for part in said.stderr.split("Compiling entry function '")[1:]:
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack.*?(\d+) bytes spill st.*?(\d+) bytes", part).groups()
        )
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        kernels.append((kernel_name(part.split("'")[0]), registers, stores + loads, stack))
    if not kernels:
        raise SystemExit(f"fmd_ext: ptxas reports no kernel of {source.name}:\n{said.stderr}")
    return kernels


def main() -> int:
    nvcc = find_nvcc()
    spilling = 0
    print(f"{'arch':5} {'kernel':54} {'registers':>9} {'spills':>7} {'stack':>6}   (bytes per thread)")
    pairs = sources(sys.argv[1:])
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        reports = pool.map(lambda pair: report(nvcc, pair[1], pair[0]), pairs)
        for (architecture, _), kernels in zip(pairs, reports, strict=True):
            for kernel, registers, spills, stack in kernels:
                print(f"{architecture:5} {kernel:54} {registers:9} {spills:7} {stack:6}", flush=True)
                spilling += spills > 0
    if spilling:
        print(f"fmd_ext: {spilling} kernels spill registers", file=sys.stderr)
    return min(spilling, 1)


if __name__ == "__main__":
    sys.exit(main())

"""Which CUDA kernels there are, what source each is made of, and on which device that source has passed its tests.

csrc/cuda/kernels.json lists them by op, oldest first. An entry's `passed` names a device and the digest of the source
that passed there; it counts while the present source has that digest. Where only the host's side has changed since,
scripts/same_machine_code moves the record and names the revision that passed (`machine_code_of`). The build compiles
these facts into the CUDA library (`header`), whose "auto" runs the newest kernel of an op that has passed; scripts/gpu
writes them (`record`).

Usage: fmd_kernel_sources.py header FILE | record
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = ("csrc", "csrc/include")
NOT_OURS = {"cuda_host/intrinsics.h", "cuda_host/sm90.h", "cuda_host/grid.h"}  # the tests' side of the intrinsics


@dataclass(frozen=True)
class Kernel:
    """`capability`: the one it needs ("9.0" as 90), 0 for every device from sm_80 on. `sources`: the present source's
    digest. `passed_on`: the device that it has passed on; "" where this source has passed on none."""

    op: str
    name: str
    source: str
    capability: int
    sources: str
    passed_on: str


def table_path(root: Path = ROOT) -> Path:
    return root / "csrc" / "cuda" / "kernels.json"


def kernels(root: Path = ROOT) -> list[Kernel]:
    """All kernels, those of one op from the oldest to the newest."""
    found = []
    for op, entries in json.loads(table_path(root).read_text()).items():
        for entry in entries:
            present, passed = digest(entry["source"], root), entry.get("passed", {})
            device = passed.get("device", "") if passed.get("sources") == present else ""
            if device and "machine_code_of" in passed:
                device += f" as this machine code, that of {passed['machine_code_of']}; its host code has changed since"
            found.append(Kernel(op, entry["kernel"], entry["source"], entry.get("capability", 0), present, device))
    return found


def digest(source: str, root: Path = ROOT) -> str:
    """16 hexadecimal digits of a source and all of csrc that it includes, comments and spacing aside."""
    seen: dict[str, str] = {}
    _collect(root, source, seen)
    joined = "\n".join(f"{path}\n{text}" for path, text in sorted(seen.items()))
    return hashlib.sha256(joined.encode()).hexdigest()[:16]


def _collect(root: Path, path: str, seen: dict[str, str]) -> None:
    if path in seen:
        return
    text = (root / path).read_text()
    seen[path] = " ".join(re.sub(r"//.*", "", text).split())
    for name in re.findall(r'(?m)^#include "(.+)"', text):
        candidates = [f"{folder}/{name}" for folder in INCLUDE if (root / folder / name).is_file()]
        if candidates:
            _collect(root, candidates[0], seen)
        elif name not in NOT_OURS:
            raise FileNotFoundError(f"fmd_ext: {path} includes {name}, which is not in {' or '.join(INCLUDE)}")


def header(root: Path = ROOT) -> str:
    """The facts as csrc/cuda/choice.cu includes them."""
    lines = ["// Written by build_backend/fmd_kernel_sources.py from csrc/cuda/kernels.json and the sources."]
    for kernel in kernels(root):
        fields = ", ".join(json.dumps(text) for text in (kernel.op, kernel.name, kernel.sources, kernel.passed_on))
        lines.append(f"FMD_CUDA_KERNEL({fields}, {kernel.capability})")
    return "\n".join(lines) + "\n"


def record(passed: list[Kernel], device: str, root: Path = ROOT, machine_code_of: str = "") -> None:
    """Writes down that these kernels, of the sources they name, have passed their tests on a device.

    machine_code_of: the revision that passed there, where the present source is another one that compiles to the same
    machine code.
    """
    table = json.loads(table_path(root).read_text())
    for kernel in passed:
        entry = next(entry for entry in table[kernel.op] if entry["kernel"] == kernel.name)
        entry["passed"] = {"sources": kernel.sources, "device": device}
        if machine_code_of:
            entry["passed"]["machine_code_of"] = machine_code_of
    table_path(root).write_text(json.dumps(table, indent=1) + "\n")


def record_this_device() -> None:
    """`record` for all kernels of the loaded library that run on the current device: their tests have just passed."""
    import torch

    from fmd_ext.ops import library

    major, minor = torch.cuda.get_device_capability()
    ran = [kernel for kernel in library.cuda_kernels() if kernel.capability in (0, 10 * major + minor)]
    record([Kernel(k.op, k.name, "", k.capability, k.sources, "") for k in ran], torch.cuda.get_device_name())
    print(f"fmd_ext: {len(ran)} kernels passed on {torch.cuda.get_device_name()}: {table_path()}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["header"] and len(sys.argv) == 3:
        target = Path(sys.argv[2])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(header())
    elif sys.argv[1:] == ["record"]:
        record_this_device()
    else:
        sys.exit(__doc__)

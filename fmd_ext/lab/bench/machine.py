"""Where and with what a measurement was made."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

import fmd_ext
from fmd_ext.hardware import cpu_model
from fmd_ext.ops import library

PACKAGE = Path(fmd_ext.__file__).resolve().parent


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, versions, revision and date, as JSON holds them."""
    return {
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": library.cpu_isa(),
            "torch_isa": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "fmd_ext": fmd_ext.__version__,
        },
        "revision": revision(PACKAGE),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def revision(package: Path) -> dict[str, Any]:
    """``commit`` and ``dirty`` (sources differ from the commit) of the checkout that holds ``package``.

    ``commit`` is a sentence where there is none. A package installed into an environment is not a checkout, even where
    that environment lies inside one.
    """
    top = _git(package, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != package.parent:
        return {"commit": "not a git checkout", "dirty": None}
    commit = _git(package, "rev-parse", "--verify", "--quiet", "HEAD")
    # docs/ holds what benchmarks write, not what they measure.
    changed = _git(package.parent, "status", "--porcelain", "--", ".", ":(exclude)docs")
    return {"commit": commit or "no commit yet", "dirty": bool(changed)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        said = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.stdout.strip()

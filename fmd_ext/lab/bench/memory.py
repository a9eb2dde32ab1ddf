"""Peak memory up to the first token of a long prompt: ``python -m fmd_ext.lab.bench.memory``, unpatched and patched.

On CUDA it is what torch's allocator holds at most; on a CPU the resident memory of a process of its own (Linux), in
which large blocks go back to the system when they are freed. What holds the model and the prompt's embeddings is left
out.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fmd_ext
from fmd_ext.lab.bench.checking import row_error
from fmd_ext.lab.bench.machine import PACKAGE, revision
from fmd_ext.lab.bench.models import build_thinker, sharing_weights
from fmd_ext.lab.bench.workload import LONG_SIZES, Prompt

NAME = "model_memory"
PLAIN = ", no fusions"
# Per way: settings of `patch`; None is the unpatched model.
WAYS: dict[str, dict[str, Any] | None] = {
    "vanilla": None,
    "attention masking": {"masking": "attention"},
    f"attention masking{PLAIN}": {"masking": "attention", "fusions": False},
    "zero masking": {"masking": "zero"},
    f"zero masking{PLAIN}": {"masking": "zero", "fusions": False},
}
# glibc hands blocks above this back to the system at once.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ALLOWED = 64  # difference of a way's logits with and without fusions: times the dtype's epsilon and the largest value


def prompt_of(rows: int) -> Prompt:
    """A clip and a question: 80 rows of text, three rows of video to one of sound."""
    visual = (rows - 80) * 3 // 4
    return Prompt(20, visual, 2, rows - 80 - visual, 58)


def measure(size_name: str, rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """A case as JSON holds it: per way, bytes at the peak and the seconds of the one call.

    Where a way gives other logits than it gives without fusions there are no figures, only ``error``.
    """
    size = LONG_SIZES[size_name]
    torch.manual_seed(0)
    model = build_thinker(size, rows + 16, dtype, device, vocab_size=size.vocab_size)
    embeds = torch.randn(1, rows, size.hidden_size, dtype=dtype, device=device)
    labels = torch.from_numpy(prompt_of(rows).labels).long()
    case = {"case": f"{NAME}/{rows}", "shapes": {"rows": rows, **size.describe()}}
    logits: dict[str, torch.Tensor] = {}
    candidates = []
    for name, settings in WAYS.items():
        own = sharing_weights(model)
        given = {"inputs_embeds": embeds, "attention_mask": torch.ones(1, rows, dtype=torch.long, device=device)}
        if settings is not None:
            fmd_ext.patch(own, fork_layers=size.fork_layers, runner=False, **settings)
            given["modality_labels"] = labels
        before = _begin(device)
        start = time.perf_counter()
        out = own.generate(
            **given,
            max_new_tokens=1,
            min_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        peak = _peak(device) - before
        candidates.append({"name": name, "bytes": peak, "seconds": time.perf_counter() - start})
        logits[name] = out.logits[0].float()
        del own, out
    for name, own in logits.items():
        error = row_error(own, logits.get(name + PLAIN, own))
        if not error <= ALLOWED * torch.finfo(dtype).eps:
            return {**case, "error": f"{case['case']}, {name}: relative error {error:.2e} over the one without fusions"}
    for candidate in candidates:
        candidate["ratio"] = candidate["bytes"] / candidates[0]["bytes"]
    return {**case, "revision": revision(PACKAGE), "candidates": candidates}


def case(size_name: str, rows: int, dtype: str, device: torch.device) -> dict[str, Any]:
    """`measure`; on a CPU in a process of its own. Where that cannot be measured there is only ``absent``."""
    if device.type == "cuda":
        return measure(size_name, rows, getattr(torch, dtype), device)
    if not CLEAR.exists():
        return {"case": f"{NAME}/{rows}", "absent": {NAME: "resident memory is read from /proc, as Linux has it"}}
    words = [size_name, str(rows), dtype, "--threads", str(torch.get_num_threads())]
    command = [sys.executable, "-m", "fmd_ext.lab.bench.memory", *words]
    done = subprocess.run(command, env={**os.environ, **ALLOCATOR}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _begin(device: torch.device) -> int:
    """Bytes held now; from here on the peak counts."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    CLEAR.write_text("5")  # sets the peak to what is held now
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(name: str) -> int:
    found = re.search(rf"(?m)^{name}:\s+(\d+) kB$", STATUS.read_text())
    if found is None:
        raise RuntimeError(f"{STATUS} has no {name}")
    return 1024 * int(found[1])


def main(argv: Sequence[str] | None = None) -> int:
    """Measures one case on the CPU, in this process, and prints it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m fmd_ext.lab.bench.memory", description=__doc__)
    parser.add_argument("size", choices=tuple(LONG_SIZES), help="model size")
    parser.add_argument("rows", type=int, help="positions of the prompt")
    parser.add_argument("dtype", help="float32, bfloat16 or float16")
    parser.add_argument("--threads", type=int, help="torch's threads")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    with torch.inference_mode():
        print(json.dumps(measure(args.size, args.rows, getattr(torch, args.dtype), torch.device("cpu"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

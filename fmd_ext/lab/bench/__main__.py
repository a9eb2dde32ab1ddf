"""``python -m fmd_ext.lab.bench``: arguments, and what becomes of the results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import attention_cases, encoder_cases, fused_cases, machine, memory, model_cases, report, row_cases
from .cases import Case, run_case
from .roofline import add_limits, measure_peaks
from .timing import MIN_ROUNDS
from .workload import (
    CLIPS,
    EXTRAS,
    LONG_ROWS,
    PROMPT,
    QUICK_CLIPS,
    QUICK_EXTRAS,
    QUICK_LONG_ROWS,
    QUICK_PROMPT,
    SIZES,
    Workload,
)

ATTENTION_OPS, MODEL_CALLS = (
    ("branched_prefill", "branched_decode"),
    ("model_prefill", "model_decode", "model_generate"),
)
OPS = ("append_", *ATTENTION_OPS, "merge_", "rope_append_", *MODEL_CALLS, encoder_cases.NAME)
DTYPES = ("float32", "bfloat16", "float16")
SECONDS_PER_CASE, SECONDS_PER_QUICK_CASE = 5.0, 0.05
WRONG_OUTPUT, USER_ERROR = 1, 2

Build = Callable[[Workload, torch.dtype, torch.device, set[str]], Iterable[Case]]


def build_cases(workload: Workload, dtype: torch.dtype, device: torch.device, ops: set[str]) -> Iterable[Case]:
    """The cases of ``ops``, made one at a time."""
    builders: tuple[tuple[tuple[str, ...], Callable[..., Iterable[Case]]], ...] = (
        (("append_",), row_cases.append_cases),
        (ATTENTION_OPS, attention_cases.cases),
        (("merge_",), row_cases.merge_cases),
        (("rope_append_",), fused_cases.cases),
    )
    for names, build in builders:
        if ops.intersection(names):
            yield from (case for case in build(workload, dtype, device) if case.op in ops)
    if ops.intersection(MODEL_CALLS):
        yield from model_cases.cases(workload, dtype, device, ops)
    if encoder_cases.NAME in ops:
        yield from encoder_cases.cases(workload, dtype, device)


def main(argv: Sequence[str] | None = None, build: Build = build_cases) -> int:
    """Runs the benchmarks. Returns the exit code: 0, 1 (a wrong output) or 2 (wrong arguments)."""
    args = _parser().parse_args(argv)
    try:
        device = _device(args.device)
    except ValueError as error:
        print(f"fmd_ext.lab.bench: error: {error}", file=sys.stderr)
        return USER_ERROR
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    size = args.size or ("tiny" if args.quick else "quarter" if device.type == "cpu" else "full")
    if args.quick:
        workload = Workload(SIZES[size], QUICK_PROMPT, QUICK_EXTRAS, QUICK_CLIPS)
    else:
        extras = EXTRAS if device.type == "cuda" else ()
        workload = Workload(SIZES[size], PROMPT, extras, CLIPS[device.type])
    facts: dict[str, Any] = {
        "command": " ".join(["python -m fmd_ext.lab.bench", *(sys.argv[1:] if argv is None else argv)]),
        **machine.describe(device),
        "device": device.type,
        "dtype": dtype,
        "workload": workload.describe(),
        "cases": [],
        "memory": [],
    }
    wanted = set(args.only or (*OPS, memory.NAME))
    budget = SECONDS_PER_QUICK_CASE if args.quick else SECONDS_PER_CASE
    with torch.inference_mode():
        facts["peaks"] = measure_peaks(device, getattr(torch, dtype), args.quick)
        torch.manual_seed(0)
        for case in build(workload, getattr(torch, dtype), device, wanted):
            print(f"{case.name} ...", file=sys.stderr)
            report_of_case = run_case(case, device, args.repeats, budget)
            add_limits(report_of_case, case.work, facts["peaks"])
            facts["cases"].append(report_of_case)
            _write(facts, args.json)
            del case  # its tensors, before the next case makes its own
        for rows in _long_rows(args, device) if memory.NAME in wanted else ():
            print(f"{memory.NAME}/{rows} ...", file=sys.stderr)
            long_size = "tiny" if args.quick else "fourteenth" if device.type == "cpu" else "full"
            facts["memory"].append(memory.case(long_size, rows, dtype, device))
            _write(facts, args.json)
    return _finish(facts)


def _long_rows(args: argparse.Namespace, device: torch.device) -> Sequence[int]:
    return args.rows or (QUICK_LONG_ROWS if args.quick else LONG_ROWS[device.type])


def _write(facts: dict[str, Any], path: Path | None) -> None:
    """After each case: what stops the next one loses nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts, indent=1) + "\n")


def _finish(facts: dict[str, Any]) -> int:
    for name, text in report.summary(facts):
        print(f"{name:<16}{text}")
    print()
    print(report.table(facts["cases"]))
    if facts["memory"]:
        print(f"\n{report.memory_table(facts['memory'])}")
    for name, reason in report.absent([*facts["cases"], *facts["memory"]]).items():
        print(f"absent: {name}: {reason}")
    errors = [case["error"] for case in [*facts["cases"], *facts["memory"]] if "error" in case]
    for error in errors:
        print(f"fmd_ext.lab.bench: error: {error}; no figure is reported for this case", file=sys.stderr)
    return WRONG_OUTPUT if errors else 0


def _device(name: str) -> torch.device:
    """Raises ValueError for a device that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; give cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"fmd_ext has ops for cpu and cuda, not for {device.type}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"torch {torch.__version__} sees no CUDA device")
    return device


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fmd_ext.lab.bench",
        description="Each op, and prefill and decode step of a whole model, against what one would use instead. "
        "An output is checked against plain PyTorch before its speed is reported.",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=(*OPS, memory.NAME),
        metavar="NAME",
        help=f"some of {', '.join((*OPS, memory.NAME))}",
    )
    parser.add_argument("--quick", action="store_true", help="small shapes and few repeats: does it run, not how fast")
    parser.add_argument("--size", choices=tuple(SIZES), help="model size (quarter; on a GPU full; with --quick tiny)")
    parser.add_argument("--dtype", choices=DTYPES, help="(float32; on a GPU bfloat16)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    parser.add_argument(
        "--repeats",
        type=_positive_int,
        metavar="N",
        help=f"rounds per case (as many as fit into {SECONDS_PER_CASE:.0f} s, at least {MIN_ROUNDS})",
    )
    parser.add_argument("--threads", type=_positive_int, metavar="N", help="torch's threads (as torch sets them)")
    parser.add_argument(
        "--rows", type=_positive_int, nargs="+", metavar="N", help="of the prompts whose memory is measured (32768)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there")
    return parser


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())

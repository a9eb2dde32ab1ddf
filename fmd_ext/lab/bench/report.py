"""Measurements as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

MEMORY_COLUMNS = ("case", "candidate", "peak", "ratio")
COLUMNS = ("case", "rounds", "candidate", "median", "quartiles", "min", "ratio", "quartiles", "error", "of peak")


def table(cases: list[dict[str, Any]]) -> str:
    """All cases, aligned. ``ratio`` is over the first candidate of the case, pair by pair."""
    left = (str.ljust, str.rjust, str.ljust) + (str.rjust,) * (len(COLUMNS) - 3)
    return _aligned([COLUMNS, *(row for case in cases for row in rows_of(case))], left)


def memory_table(cases: list[dict[str, Any]]) -> str:
    """Those of `fmd_ext.lab.bench.memory`, aligned."""
    rows = [MEMORY_COLUMNS, *(row for case in cases for row in memory_rows_of(case))]
    return _aligned(rows, (str.ljust, str.ljust, str.rjust, str.rjust))


def _aligned(rows: list[tuple[str, ...]], left: tuple[Callable[[str, int], str], ...]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(left))]
    return "\n".join(
        "  ".join(align(cell, width) for align, cell, width in zip(left, row, widths, strict=True)).rstrip()
        for row in rows
    )


def rows_of(case: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row of text per candidate; for a case that failed, none."""
    for index, candidate in enumerate(case.get("candidates", ())):
        seconds, ratio = candidate["seconds"], candidate["ratio"]
        yield (
            case["case"] if index == 0 else "",
            str(case["rounds"]) if index == 0 else "",
            candidate["name"],
            duration(seconds["median"]),
            f"{duration(seconds['q1'])} to {duration(seconds['q3'])}",
            duration(seconds["min"]),
            number(ratio["median"]),
            f"{number(ratio['q1'])} to {number(ratio['q3'])}" if index else "",
            f"{candidate['error']:.0e}",
            f"{candidate['of_peak']:.0%}" if "of_peak" in candidate else "",
        )


def memory_rows_of(case: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row of text per way to run the model; for a case that failed, none."""
    for index, candidate in enumerate(case.get("candidates", ())):
        mebibytes = f"{candidate['bytes'] / 2**20:,.0f} MiB"
        yield case["case"] if index == 0 else "", candidate["name"], mebibytes, number(candidate["ratio"])


def absent(cases: list[dict[str, Any]]) -> dict[str, str]:
    """Candidates that could not run here, with the reason of the first case that says one."""
    reasons: dict[str, str] = {}
    for case in cases:
        reasons = {**case.get("absent", {}), **reasons}
    return reasons


def duration(seconds: float) -> str:
    """With three digits and a unit."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1 or unit == "us":
            return f"{number(seconds * factor)} {unit}"
    raise AssertionError("unreachable")


def number(value: float) -> str:
    """Two decimals below ten, one below a hundred, none above."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def summary(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Machine, versions, revision and setting, as pairs of name and text."""
    machine, versions, revision = facts["machine"], facts["versions"], facts["revision"]
    size, prompt = facts["workload"]["size"], facts["workload"]["prompt"]
    dirty = {None: "", False: ", clean", True: ", with uncommitted changes"}[revision["dirty"]]
    text = prompt["prefix"] + prompt["between"] + prompt["rest"]
    lines = [
        ("CPU", f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"),
        ("instruction set", f"{machine['isa']} (torch: {machine['torch_isa']})"),
    ]
    if machine["gpu"]:
        lines.append(("GPU", machine["gpu"]))
    if "peaks" in facts:
        copy, matrix = facts["peaks"]["copy_bytes_per_s"] / 1e9, facts["peaks"]["matrix_flops_per_s"] / 1e12
        lines.append(("peaks", f"copy {number(copy)} GB/s, matrix product {number(matrix)} TFLOP/s (measured)"))
    return [
        *lines,
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("revision", revision["commit"] + dirty),
        ("date", facts["date"]),
        ("device, dtype", f"{facts['device']}, {facts['dtype']}"),
        (
            "model",
            f"{size['name']}: hidden {size['hidden_size']}, {size['num_layers']} layers "
            f"({facts['workload']['fork_layers']} forked), {size['num_qo_heads']} query and {size['num_kv_heads']} "
            f"key heads of {size['head_dim']}, intermediate {size['intermediate_size']}",
        ),
        (
            "prompt",
            f"{prompt['visual']} video, {prompt['audio']} audio, {text} text rows ({prompt['prefix']} before the clip)",
        ),
    ]

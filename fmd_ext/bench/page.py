"""``python -m fmd_ext.bench.page DATA PAGE``: the performance page, from the JSON files of benchmark runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .report import COLUMNS, rows_of, summary

NOTE = "<!-- Written by scripts/benchmarks from docs/data/*.json: change those, never this page. -->"
INTRODUCTION = """
`scripts/benchmarks` measures again and rewrites this page. Every output was compared with plain PyTorch (float64 for
ops, float32 for models) in the run that timed it, before the first and after the last timed round; `error` is the
largest difference of a row relative to its largest value. All candidates run once per round, each
round in another order. `ratio` is a candidate's time over that of the first of its case in the same round: median and
quartiles over rounds.

* `fmd_ext` works on packed rows and slot pools; `merged` is attention after the merge, where there is one branch.
* `eager PyTorch` is index arithmetic, masked softmax and concatenation on the same packed rows.
* `SDPA per branch` calls `scaled_dot_product_attention` once per branch, on inputs gathered before the clock starts.
* `vanilla` is the unpatched model on `scaled_dot_product_attention`; `two passes` runs the early layers twice, as the
  paper does. Models have random weights and a small vocabulary; encoders are not part of the time.
""".strip()
DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def page(runs: Sequence[dict[str, Any]]) -> str:
    """The page in Markdown. Raises ValueError for a run in which an output was wrong."""
    for run in runs:
        for case in run["cases"]:
            if "error" in case:
                raise ValueError(f"a run with a wrong output has no place on the page: {case['error']}")
    lines = [NOTE, "", "# Performance", "", INTRODUCTION, ""]
    for device, title in DEVICES.items():
        lines += [f"## {title}", ""]
        own = [run for run in runs if run["device"] == device]
        if not own:
            lines += ["Not measured.", ""]
        for run in own:
            lines += [*_run(run), ""]
    return "\n".join(lines).rstrip() + "\n"


def _run(run: dict[str, Any]) -> Iterator[str]:
    yield f"`{run['command']}`"
    yield ""
    yield from (f"* {name}: {text}" for name, text in summary(run))
    yield ""
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "| --- | ---: | --- |" + " ---: |" * (len(COLUMNS) - 3)
    for case in run["cases"]:
        yield from ("| " + " | ".join(row) + " |" for row in rows_of(case))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fmd_ext.bench.page", description=__doc__)
    parser.add_argument("data", type=Path, help="folder with the JSON files of benchmark runs")
    parser.add_argument("page", type=Path, help="the Markdown file to write")
    args = parser.parse_args(argv)
    files = sorted(args.data.glob("*.json"))
    if not files:
        print(f"fmd_ext.bench.page: error: no *.json in {args.data}", file=sys.stderr)
        return 2
    try:
        text = page([json.loads(file.read_text()) for file in files])
    except ValueError as error:
        print(f"fmd_ext.bench.page: error: {error}", file=sys.stderr)
        return 1
    args.page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes the performance page and the README's figures from the JSON files of benchmark runs.

``python -m fmd_ext.lab.bench.page DATA PAGE README``
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .report import COLUMNS, MEMORY_COLUMNS, absent, memory_rows_of, rows_of, summary

NOTE = "<!-- Written by scripts/benchmarks from docs/data/*.json: change those, never this page. -->"
INTRODUCTION = """
`scripts/benchmarks` measures again and rewrites this page. It compares every output with plain PyTorch
(float64 for ops, float32 for models) before and after it is timed.

* All candidates run once per round, each round in another order. On a GPU an op runs behind other work with cold
  caches, a model on an idle device.
* `ratio`: time over that of the first candidate of the case in the same round; median and quartiles over rounds.
* `error`: largest difference of a row, relative to its largest value.
* `of peak`: the least possible time (every byte once, only visible pairs; for models that of the unpatched one) at
  the copy bandwidth and matrix rate measured in the same run, over the candidate's time.

* `fmd_ext` works on packed rows and slot pools, `eager PyTorch` on the same rows by index arithmetic, masked
  softmax and concatenation. `merged` is attention after the merge. `rope_append_` joins steps that its other
  candidates take singly.
* `causal runs`: the same by torch's causal attention, gathering included, as `patch` does where that is faster.
* `SDPA per branch` is one call of `scaled_dot_product_attention` per branch, on inputs gathered beforehand. On a
  GPU its flash and cuDNN backends, compiled FlexAttention, flash-attn and FlashInfer also run.
* `vanilla` is the unpatched model, `two passes` runs the early layers twice, as the paper does. Models have random
  weights, a small vocabulary and no encoders.
* `no fusions`, `all fusions`: `patch(..., fusions=False)`, `True`. `asked first`: a prompt of 64 tokens asks first.
* `first_token`: `generate` of one token from a clip's patches and mel frames; encoders of 320 channels on a CPU.
* `model_memory/N`: `generate` of one token behind a prompt of N rows; what model and embeddings hold is left out.
* `…, runner` decodes over static buffers (on a GPU: a CUDA graph). `model_generate` is `model.generate` of 32
  tokens.
""".strip()
DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def page(runs: Sequence[dict[str, Any]]) -> str:
    """The page in Markdown. Raises ValueError for a run in which an output was wrong."""
    for run in runs:
        for case in [*run["cases"], *run.get("memory", [])]:
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


# What the README tells, in its words: case and candidate, and what the time is compared with.
HEADLINES = {
    "prefill, attention masking": ("model_prefill", "attention masking", "the unpatched model"),
    "prefill, zero masking": ("model_prefill", "zero masking", "the unpatched model"),
    "prefill, zero masking, alpha chosen by the prompt": (
        "model_prefill",
        "zero masking, alpha auto",
        "the unpatched model",
    ),
    "prefill, two passes as in the paper": ("model_prefill", "two passes", "the unpatched model"),
    "decode step, attention masking": ("model_decode", "attention masking", "the unpatched model"),
    "decode step, zero masking": ("model_decode", "zero masking", "the unpatched model"),
    "decode step, two passes": ("model_decode", "two passes", "the unpatched model"),
    "decode step, zero masking, decode runner": ("model_decode", "zero masking, runner", "the unpatched model"),
    "decode step, no forking, decode runner": ("model_decode", "vanilla, runner", "the unpatched model"),
}
BEGIN, END = "<!-- figures: written by scripts/benchmarks -->", "<!-- end of figures -->"


def figures(runs: Sequence[dict[str, Any]]) -> str:
    """The README's table: whole-model times over those of the unpatched model, first run of each device."""
    lines = []
    for run in runs:
        facts = dict(summary(run))
        lines += ["", f"| time, {DEVICES[run['device']]}, {run['dtype']} | over that of | median ratio (quartiles) |"]
        lines += ["| --- | --- | ---: |"]
        for title, (stem, name, over) in HEADLINES.items():
            for case in run["cases"]:
                for candidate in case["candidates"] if case["case"].startswith(stem) else ():
                    if candidate["name"] == name:
                        ratio = candidate["ratio"]
                        spread = f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})"
                        lines.append(f"| {title} | {over} | {spread} |")
        lines += ["", f"{facts['CPU']}; {facts['model']}, random weights; {facts['prompt']}.", ""]
    return "\n".join([BEGIN, *lines, END])


def with_figures(readme: str, runs: Sequence[dict[str, Any]]) -> str:
    """The README's text with the part between its two markers rewritten. Raises ValueError without the markers."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"the README has no single part between {BEGIN!r} and {END!r}")
    return readme[: readme.index(BEGIN)] + figures(runs) + readme[readme.index(END) + len(END) :]


def _run(run: dict[str, Any]) -> Iterator[str]:
    yield f"`{run['command']}`"
    yield ""
    yield from (f"* {name}: {text}" for name, text in summary(run))
    yield ""
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "| --- | ---: | --- |" + " ---: |" * (len(COLUMNS) - 3)
    for case in run["cases"]:
        yield from ("| " + " | ".join(row) + " |" for row in rows_of(case))
    memory = run.get("memory", [])
    yield from _memory([case for case in memory if "candidates" in case])
    reasons = absent([*run["cases"], *memory])
    if reasons:
        yield from ("", "Not measured, because they could not run there:", "")
        yield from (f"* {name}: `{reason}`" for name, reason in reasons.items())


def _memory(cases: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not cases:
        return
    sizes = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in cases[0]["shapes"].items() if name != "rows")
    yield from ("", f"Peak memory, revision {cases[0]['revision']['commit']}; {sizes}:", "")
    yield "| " + " | ".join(MEMORY_COLUMNS) + " |"
    yield "| --- | --- | ---: | ---: |"
    for case in cases:
        yield from ("| " + " | ".join(row) + " |" for row in memory_rows_of(case))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fmd_ext.lab.bench.page", description=__doc__)
    parser.add_argument("data", type=Path, help="folder with the JSON files of benchmark runs, bench_*.json")
    parser.add_argument("page", type=Path, help="the Markdown file to write")
    parser.add_argument("readme", type=Path, nargs="?", help="the README whose figures to rewrite")
    args = parser.parse_args(argv)
    files = sorted(args.data.glob("bench_*.json"))
    if not files:
        print(f"fmd_ext.lab.bench.page: error: no bench_*.json in {args.data}", file=sys.stderr)
        return 2
    try:
        runs = [json.loads(file.read_text()) for file in files]
        text = page(runs)
        readme = with_figures(args.readme.read_text(), runs) if args.readme else None
    except ValueError as error:
        print(f"fmd_ext.lab.bench.page: error: {error}", file=sys.stderr)
        return 1
    args.page.write_text(text)
    if readme is not None:
        args.readme.write_text(readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())

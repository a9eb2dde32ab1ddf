"""``fmd-ext curves``: accuracy against alpha, fork depth and mask scale, out of an evaluation's results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fmd_ext.cli.errors import blaming_input, check_target
from fmd_ext.lab.diagnose import plots
from fmd_ext.lab.diagnose.plots import Curve
from fmd_ext.lab.eval.curves import curves_of, table_by
from fmd_ext.lab.eval.predictions import Results
from fmd_ext.lab.eval.scores import evaluate


def run(args: argparse.Namespace) -> int:
    check_target(args.json)
    with blaming_input(ValueError):
        panels = curves_of(table_by(evaluate(Results(args.results)), args.category))
    for label, lines in panels.items():
        table = Table(title=f"accuracy by {label}, with 95 % intervals clustered by video", title_justify="left")
        table.add_column(label, justify="right")
        for curve in lines:
            table.add_column(curve.name, justify="right")
        for value in sorted({value for curve in lines for value in curve.x}):
            table.add_row(f"{value:g}", *(_cell(curve, value) for curve in lines))
        if any(curve.baseline is not None for curve in lines):
            table.add_row("vanilla", *("" if c.baseline is None else f"{c.baseline:.1%}" for c in lines))
        Console(width=120).print(table)
    with blaming_input(OSError):
        print(f"plot: {plots.curves(panels, args.out)}")
        if args.json is not None:
            facts = {label: [vars(curve) for curve in lines] for label, lines in panels.items()}
            Path(args.json).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


def _cell(curve: Curve, value: float) -> str:
    if value not in curve.x:
        return ""
    at = curve.x.index(value)
    return f"{curve.y[at]:.1%} ({curve.low[at]:.1%} to {curve.high[at]:.1%})"

"""``fmd-ext compare``: the tables of results files, of one's own run or of somebody else's."""

from __future__ import annotations

import argparse

from fmd_ext.cli import show
from fmd_ext.cli.errors import blaming_input
from fmd_ext.lab.cli.scores import console, show_evaluation, show_speed
from fmd_ext.lab.eval.benchmarks import BENCHMARKS
from fmd_ext.lab.eval.predictions import ResultsError
from fmd_ext.lab.eval.results_file import ResultsFiles
from fmd_ext.lab.eval.scores import evaluate
from fmd_ext.lab.eval.statistics import require_scipy


def run(args: argparse.Namespace) -> int:
    with blaming_input(ImportError):
        require_scipy()
    with blaming_input(ResultsError, OSError):
        results = ResultsFiles(args.results)
        first = next((name for name in results.methods() if name.partition(" [")[0] == "vanilla"), None)
        evaluation = evaluate(results, baseline=args.baseline or first, protocol=args.protocol)
    for path, content in results.contents.items():
        own, about = content["run"], content["run"].get("about", {})
        revision = f" at {about['model_revision']}" if about.get("model_revision") else ""
        versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
        machine = about.get("machine", "an unknown machine")
        print(f"{path}: {BENCHMARKS[own['benchmark']].title}; {own['model']}{revision}; {machine}; {versions}")
    if results.differ:
        show.note(f"the files differ in {', '.join(results.differ)}: so may the answers, whatever the method")
    show_evaluation(console(), evaluation)
    for content in results.contents.values():
        if content["speed"]:
            show_speed(console(), content["speed"])
    return 0

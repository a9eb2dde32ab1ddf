"""Plots of an evaluation, as SVG text to be put into a page."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

from fmd_ext.lab.eval.scores import Evaluation
from fmd_ext.lab.eval.statistics import Estimate
from fmd_ext.lab.eval.tables import Cell, Table
from fmd_ext.lab.eval.wording import short_names
from fmd_ext.lab.plotting import LINES, MARKERS, STYLE, matplotlib_

NONE = Estimate(math.nan, math.nan, math.nan, math.nan, 0, 0)  # where there is nothing to compare


def accuracy_figure(evaluation: Evaluation, table: Table) -> str:
    """Accuracy of each method in each group, with its interval."""
    return _dots(
        short_names(evaluation.methods),
        table,
        lambda cell: cell.accuracy,
        title=f"Accuracy by {table.category}",
        label="accuracy, % (95 % interval, clustered by video)",
    )


def difference_figure(evaluation: Evaluation, table: Table) -> str:
    """Gain of each method over the baseline on the same items, with its interval; right of the line is better."""
    names = short_names(evaluation.methods)
    baseline = names.pop(evaluation.baseline)
    return _dots(
        names,
        table,
        lambda cell: cell.comparison.difference if cell.comparison else NONE,
        title=f"Gain over {baseline} by {table.category}",
        label="points (95 % interval of the paired difference)",
        first_style=1,
        zero=True,
    )


def _dots(
    names: dict[str, str],
    table: Table,
    pick: Callable[[Cell], Estimate],
    *,
    title: str,
    label: str,
    first_style: int = 0,
    zero: bool = False,
) -> str:
    methods, groups = list(names), list(table.rows)
    gap = 0.72 / max(len(methods), 1)
    height = 1.1 + len(groups) * max(0.34, 0.17 * len(methods)) + 0.2 * len(methods)
    matplotlib = matplotlib_()
    # A salt of its own: ids within one page must not meet.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        drawn = matplotlib.figure.Figure(figsize=(7.4, height), layout="constrained")
        axes = drawn.subplots()
        for number, method in enumerate(methods):
            style = (number + first_style) % len(LINES)
            offset = (number - (len(methods) - 1) / 2) * gap
            estimates = [pick(table.rows[group][method]) for group in groups]
            places = [index + offset for index in range(len(groups))]
            axes.errorbar(
                [100 * estimate.value for estimate in estimates],
                places,
                xerr=[[_reach(e.value - e.low) for e in estimates], [_reach(e.high - e.value) for e in estimates]],
                fmt=MARKERS[style],
                color=LINES[style],
                markersize=5,
                capsize=2.5,
                linewidth=1.3,
                label=names[method],
            )
        counts = [table.rows[group][methods[0]].accuracy.num_items for group in groups]
        axes.set_yticks(range(len(groups)), [f"{g} ({n})" for g, n in zip(groups, counts, strict=True)])
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.grid(axis="x")
        if zero:
            axes.axvline(0, color="#444444", linewidth=1)
        axes.set_xlabel(label)
        axes.set_title(title)
        if len(methods) > 1:
            drawn.legend(loc="outside lower center", ncols=min(3, len(methods)))
        return _svg(drawn, title)


def _reach(distance: float) -> float:
    """In per cent, of a bar; matplotlib refuses negative ones, which a percentile interval beside its value gives."""
    return 100 * max(0.0, distance) if math.isfinite(distance) else 0.0


def _svg(drawn: Any, title: str) -> str:
    text = io.StringIO()
    drawn.savefig(text, format="svg", metadata={"Date": None, "Title": title}, facecolor="white")
    svg = text.getvalue()
    return svg[svg.index("<svg") :]  # without the XML declaration, which a page must not hold

"""How accuracy depends on one setting: curves out of an evaluation whose methods differ in that setting alone."""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping

from fmd_ext.lab.diagnose.plots import Curve
from fmd_ext.lab.eval.methods import parse_methods
from fmd_ext.lab.eval.scores import ALL, Evaluation
from fmd_ext.lab.eval.tables import Table

SETTINGS = {"fork_layers": "fork layers", "alpha": "alpha", "mask_scale": "mask scale"}
BASELINE = "vanilla"


def table_by(evaluation: Evaluation, category: str | None) -> Table:
    """The evaluation's table for a category; None: that of all questions. Raises ValueError naming those there are."""
    tables = {table.category: table for table in evaluation.tables}
    name = ALL if category is None else category
    if name not in tables:
        known = ", ".join(other for other in tables if other != ALL) or "none"
        raise ValueError(f"the evaluation has no table by {name!r}; there are {known}")
    return tables[name]


def curves_of(table: Table) -> dict[str, list[Curve]]:
    """Curves by setting, one per row of the table; of methods that differ in that setting alone the largest family.

    Raises ValueError where no two methods differ in one of `SETTINGS` alone.
    """
    methods = list(dict.fromkeys(method for row in table.rows.values() for method in row))
    panels: dict[str, list[Curve]] = {}
    for setting, label in SETTINGS.items():
        families: dict[str, dict[float, str]] = collections.defaultdict(dict)
        for method in methods:
            (choice,) = parse_methods(method)
            value = choice.settings.get(setting)
            if isinstance(value, (int, float)):
                rest = {name: v for name, v in choice.settings.items() if name != setting}
                families[json.dumps([choice.method.name, rest], sort_keys=True)][float(value)] = method
        largest = max(families.values(), key=len, default={})
        if len(largest) > 1:
            panels[label] = lines_of(table, largest)
    if not panels:
        raise ValueError(
            f"no two methods of the evaluation differ in one of {', '.join(SETTINGS)} alone; ask for instance for "
            "--method vanilla,fmd-zero:alpha=0.6,fmd-zero:alpha=0.8"
        )
    return panels


def lines_of(table: Table, methods: Mapping[float, str]) -> list[Curve]:
    """One curve per row of the table, over the values that stand for ``methods``."""
    lines = []
    for group, row in table.rows.items():
        found = [(value, row[methods[value]].accuracy) for value in sorted(methods) if methods[value] in row]
        lines.append(
            Curve(
                group if group != ALL else "all questions",
                [float(value) for value, _ in found],
                [accuracy.value for _, accuracy in found],
                [accuracy.low for _, accuracy in found],
                [accuracy.high for _, accuracy in found],
                row[BASELINE].accuracy.value if BASELINE in row else None,
            )
        )
    return lines

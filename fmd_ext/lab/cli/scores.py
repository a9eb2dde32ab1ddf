"""Tables of an evaluation, for people, on stdout."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fmd_ext.lab.eval import tables
from fmd_ext.lab.eval.scores import ALL, Evaluation
from fmd_ext.lab.eval.wording import against, caption_against, caption_score, percent, ratio, reading_lines, short_names


def console() -> Console:
    """For tables on stdout; in a file nothing needs to be squeezed into 80 columns."""
    found = Console()
    return found if found.is_terminal else Console(width=180)


def show_evaluation(console: Console, evaluation: Evaluation) -> None:
    """All of it; methods by their short names, which the first lines explain."""
    names = short_names(evaluation.methods)
    for method, name in names.items():
        if name != method:
            console.print(f"{name} = {method}", markup=False, highlight=False, soft_wrap=True)
    for line in (*reading_lines(evaluation, names), *evaluation.counts.lines()):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for kind, by_method in evaluation.counts.notes.items():
        counts = ", ".join(f"{count} by {names[method]}" for method, count in by_method.items())
        console.print(f"{kind}: {counts}", markup=False, highlight=False, soft_wrap=True)
    for table in evaluation.tables:
        _show_accuracy(console, evaluation, table, names)
    if any(cell.yes_no for table in evaluation.tables for row in table.rows.values() for cell in row.values()):
        _show_yes_no(console, evaluation, names)
    for category, by_method in evaluation.averages.items():
        values = ", ".join(f"{names[method]} {percent(estimate)}" for method, estimate in by_method.items())
        console.print(f"mean over {category}: {values}", markup=False, highlight=False)
    for method, found in evaluation.captions.items():
        cells = {"": found} if isinstance(found, str) else found
        for metric, cell in cells.items():
            parts = [cell] if isinstance(cell, str) else [f"{metric} {caption_score(cell)}", caption_against(cell)]
            console.print(f"captions, {names[method]}: {'; '.join(filter(None, parts))}", markup=False, highlight=False)
    for method, gain in evaluation.detectable.items():
        if math.isfinite(gain):
            console.print(
                f"these items show a gain of {100 * gain:.1f} points of {names[method]} over "
                f"{names[evaluation.baseline]} in 4 of 5 evaluations",
                markup=False,
                highlight=False,
            )
    _show_speed(console, evaluation, names)


def _show_accuracy(console: Console, evaluation: Evaluation, table: tables.Table, names: dict[str, str]) -> None:
    title = "accuracy, % (95 % interval over videos)" if table.category == ALL else f"accuracy by {table.category}, %"
    shown = Table(title=title, title_justify="left")
    for name in ("", "items", "method", "accuracy", f"against {escape(names[evaluation.baseline])}", "unparsed"):
        shown.add_column(name, justify="right" if name in ("items", "unparsed") else "left", no_wrap=name == "method")
    for value, cells in table.rows.items():
        for method, cell in cells.items():
            first = method == evaluation.baseline
            shown.add_row(
                escape(value) if first else "",
                str(cell.accuracy.num_items) if first else "",
                escape(names[method]),
                percent(cell.accuracy),
                against(cell),
                f"{100 * cell.unparsed:.1f}",
                end_section=method == evaluation.methods[-1],
            )
    console.print(shown)


def _show_yes_no(console: Console, evaluation: Evaluation, names: dict[str, str]) -> None:
    shown = Table(title='questions with "yes" or "no", %', title_justify="left")
    for name in ("", "method", "precision", "recall", "F1", "yes"):
        shown.add_column(name, no_wrap=name == "method")
    for table in evaluation.tables:
        for value, cells in table.rows.items():
            for method, cell in cells.items():
                if cell.yes_no:
                    metrics = ("precision", "recall", "f1", "yes_rate")
                    shown.add_row(
                        escape(value) if method == evaluation.baseline else "",
                        escape(names[method]),
                        *(percent(cell.yes_no[name]) for name in metrics),
                    )
    console.print(shown)


def show_speed(console: Console, speed: dict[str, Any]) -> None:
    """What `fmd_ext.lab.eval.speed.measure` gave."""
    names = short_names(list(speed["methods"]))
    title = f"speed: {speed['items']} prompts of about {speed['prompt_tokens']:.0f} tokens, {speed['tokens']} new ones"
    shown = Table(title=title, title_justify="left")
    for name in ("", "first token", "ratio (quartiles)", "tokens/s after it", "ratio (quartiles)", "peak memory"):
        shown.add_column(name, justify="right" if name else "left")
    for method, row in speed["methods"].items():
        ratios = [ratio(row[name]) for name in ("first_token_ratio", "tokens_per_s_ratio")]
        memory = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f} GiB"
        first, rate = f"{1000 * row['first_token_s']:.0f} ms", f"{row['tokens_per_s']:.1f}"
        shown.add_row(escape(names[method]), first, ratios[0], rate, ratios[1], memory)
    console.print(shown)


def _show_speed(console: Console, evaluation: Evaluation, names: dict[str, str]) -> None:
    if not evaluation.speed:
        return
    shown = Table(title="time in this run (medians; the ratio is of the same batch)", title_justify="left")
    for name in (
        "",
        "first token",
        f"over {escape(names[evaluation.baseline])}",
        "seconds per answer",
        "tokens per answer",
    ):
        shown.add_column(name, justify="right" if name else "left")
    for method, speed in evaluation.speed.items():
        shown.add_row(
            escape(names[method]),
            f"{1000 * speed['first_token_s']:.0f} ms",
            f"{speed['first_token_ratio']:.2f}",
            f"{speed['seconds_per_answer']:.2f}",
            f"{speed['tokens_per_answer']:.1f}",
        )
    console.print(shown)

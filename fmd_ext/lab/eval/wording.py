"""Numbers as tables and reports write them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fmd_ext.lab.eval.benchmarks import BENCHMARKS, Benchmark
from fmd_ext.lab.eval.methods import parse_methods
from fmd_ext.lab.eval.scores import PROTOCOLS, CaptionCell, Evaluation
from fmd_ext.lab.eval.statistics import Estimate
from fmd_ext.lab.eval.tables import Cell

# Settings that stand in a method's short name, by their letters.
LETTERS = {
    "fork_layers": "L",
    "alpha": "α",
    "mask_scale": "m",
    "text_weight": "t",
    "contrast": "c",
    "beta": "β",
    "needs": "",  # a word itself
    "wording": "",
}


def short_names(methods: Sequence[str]) -> dict[str, str]:
    """``fmd:fork_layers=7:alpha=0.8`` is ``fmd L7 α0.8``: for tables and plots. No two are alike."""
    names: dict[str, str] = {}
    for method in methods:
        try:
            (choice,) = parse_methods(method)
        except ValueError:  # of predictions made elsewhere
            name = method
        else:
            shown = [
                f"{letter}{_brief(choice.settings[key])}" for key, letter in LETTERS.items() if key in choice.settings
            ]
            name = " ".join([choice.method.name, *shown])
        taken = set(names.values())
        names[method] = next(n for n in (name, *(f"{name} ({k})" for k in range(2, 99))) if n not in taken)
    return names


def how_read(benchmark: Benchmark, protocol: str) -> str:
    """Whose reading of the answers a protocol is."""
    return f"official: {benchmark.official.source}" if protocol == "official" else "ours, as a person reads"


def reading_lines(evaluation: Evaluation, names: Mapping[str, str]) -> list[str]:
    """By which reading the figures are, and what the other one gives; ``names``: of `short_names`."""
    benchmark = BENCHMARKS[evaluation.settings["benchmark"]]
    lines = [f"reading: {how_read(benchmark, evaluation.protocol)}"]
    if evaluation.reread:
        other = next(name for name in PROTOCOLS if name != evaluation.protocol)
        told = "; ".join(
            f"{names[method]} {percent(found.accuracy)}, {found.otherwise} answers read otherwise"
            for method, found in evaluation.reread.items()
        )
        lines.append(f"beside it {how_read(benchmark, other)}: {told}")
    return lines


def passes_of(method: str) -> str:
    """What a method costs, as `methods.Passes` writes it; "" for predictions made elsewhere."""
    try:
        (choice,) = parse_methods(method)
    except ValueError:
        return ""
    return str(choice.method.passes)


def _brief(value: Any) -> str:
    if isinstance(value, Mapping):
        return "/".join(map(_brief, value.values()))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def percent(estimate: Estimate) -> str:
    """62.5 (58.1 to 66.7): per cent with the interval; a dash for what is not defined."""
    if not math.isfinite(estimate.value):
        return "–"
    if not math.isfinite(estimate.low):
        return f"{100 * estimate.value:.1f}"
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


def caption_score(cell: CaptionCell) -> str:
    """0.312, mean 0.305 (0.290 to 0.320): of the corpus, and of the captions' own scores with its interval."""
    interval = f" ({cell.mean.low:.3f} to {cell.mean.high:.3f})" if math.isfinite(cell.mean.low) else ""
    return f"{cell.corpus:.3f}, mean {cell.mean.value:.3f}{interval}"


def caption_against(cell: CaptionCell) -> str:
    """As `against`, in the metric's own units."""
    if cell.comparison is None:
        return ""
    if cell.comparison.discordance == 0:
        return "no score differs"
    estimate = cell.comparison.difference
    interval = f" ({estimate.low:+.3f} to {estimate.high:+.3f})" if math.isfinite(estimate.low) else ""
    return f"{estimate.value:+.3f}{interval}, p {cell.comparison.p_value:.2g}{' *' if cell.adjusted_p < 0.05 else ''}"


def against(cell: Cell) -> str:
    """The difference with its interval and the p-value; a star where that stays below 5 % after Holm."""
    if cell.comparison is None:
        return ""
    if cell.comparison.discordance == 0:
        return "no score differs"  # an interval of width zero would claim that none ever will
    estimate = cell.comparison.difference
    star = " *" if cell.adjusted_p < 0.05 else ""
    interval = f" ({100 * estimate.low:+.1f} to {100 * estimate.high:+.1f})" if math.isfinite(estimate.low) else ""
    return f"{100 * estimate.value:+.1f}{interval}, p {cell.comparison.p_value:.2g}{star}"


def ratio(quartiles: list[float]) -> str:
    """1.02 (0.98 to 1.07): a median with its quartiles, from the lower quartile, median and upper quartile."""
    low, median, high = quartiles
    return f"{median:.2f} ({low:.2f} to {high:.2f})"

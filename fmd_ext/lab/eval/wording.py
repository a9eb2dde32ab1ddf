"""Numbers as tables and reports write them."""

from __future__ import annotations

import math

from fmd_ext.lab.eval.statistics import Estimate
from fmd_ext.lab.eval.tables import Cell


def percent(estimate: Estimate) -> str:
    """62.5 (58.1 to 66.7): per cent with the interval; a dash for what is not defined."""
    if not math.isfinite(estimate.value):
        return "–"
    if not math.isfinite(estimate.low):
        return f"{100 * estimate.value:.1f}"
    return f"{100 * estimate.value:.1f} ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


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

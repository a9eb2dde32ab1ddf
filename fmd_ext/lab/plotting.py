"""Figures: one look for all, readable with any colour vision; no window, and nothing global of matplotlib changed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which people with any colour vision tell apart; lines differ in their markers as well.
COLOURS = {"visual": "#0072B2", "audio": "#E69F00", "text": "#B8B8B8"}
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P")
NAMES = {"visual": "video", "audio": "audio", "text": "text"}
STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "svg.fonttype": "none",
}


def figure(num_panels: int, *, width: float = 3.6, height: float = 3.2, share_y: bool = True) -> tuple[Any, list[Any]]:
    """A figure with a row of panels; sizes in inches per panel."""
    drawn = matplotlib_().figure.Figure(figsize=(width * num_panels + 0.6, height), layout="constrained")
    return drawn, list(drawn.subplots(1, num_panels, sharey=share_y, squeeze=False)[0])


def save(drawn: Any, path: str | Path) -> Path:
    """Writes the figure as the suffix says (png, svg, pdf) and returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=160, facecolor="white")
    return path


def styled(draw: Callable[..., Path]) -> Callable[..., Path]:
    """Gives a function that draws and saves a figure the look of `STYLE`."""

    @functools.wraps(draw)
    def with_style(*args: Any, **kwargs: Any) -> Path:
        with matplotlib_().rc_context(STYLE):
            return draw(*args, **kwargs)

    return with_style


def matplotlib_() -> Any:
    """The package. Raises ImportError, naming the extra, where it is not installed."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'fmd-ext[plots]'") from error
    return matplotlib

"""The demo's picture: a clip's frames, its sound, and what each method answers."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fmd_ext.inputs.media import Clip
from fmd_ext.lab.plotting import COLOURS, matplotlib_, save, styled

FRAMES = 4
WRAPPED_AT = (34, 14, 14, 14, 14)  # characters of the table's columns


@styled
def draw(path: str | Path, title: str, clip: Clip, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    """Writes the picture and returns its path.

    Args:
        clip: with frames and sound.
        titles, rows: of the table: question, what is true, and what each method says; wrong answers end in "(wrong)".
    """
    cells = [[textwrap.fill(cell, width) for cell, width in zip(row, WRAPPED_AT, strict=True)] for row in rows]
    lines = [max(cell.count("\n") + 1 for cell in row) for row in cells]
    heights = [1.5, 0.9, 0.24 * (sum(lines) + len(rows) / 2 + 1.5)]
    drawn = matplotlib_().figure.Figure(figsize=(8.4, sum(heights) + 0.7), layout="constrained")
    drawn.suptitle(title, fontweight="bold", x=0.01, ha="left")
    top, middle, bottom = drawn.subfigures(3, 1, height_ratios=heights)

    shown = np.linspace(0, len(clip.frames) - 1, min(FRAMES, len(clip.frames))).round().astype(int)
    for axes, index in zip(np.atleast_1d(top.subplots(1, len(shown))), shown, strict=True):
        axes.imshow(clip.frames[index])
        axes.set_axis_off()
        axes.set_title(f"{index / clip.fps:.1f} s", fontsize=8, fontweight="normal")

    axes = middle.subplots()
    seconds = np.arange(len(clip.audio)) / clip.sampling_rate
    axes.plot(seconds, clip.audio, color=COLOURS["audio"], linewidth=0.4)
    axes.set(xlabel="seconds", yticks=[], xlim=(0, seconds[-1]))

    axes = bottom.subplots()
    axes.set_axis_off()
    table = axes.table(cells, colLabels=list(titles), cellLoc="left", colLoc="left", bbox=(0, 0, 1, 1))
    table.auto_set_font_size(False)
    table.set_fontsize(8.5)
    total = sum(lines) + len(rows) / 2 + 1.5
    for (row, column), cell in table.get_celld().items():
        cell.set_width(WRAPPED_AT[column] / sum(WRAPPED_AT))
        cell.set_height((1.5 if row == 0 else lines[row - 1] + 0.5) / total)
        cell.set_edgecolor("#DDDDDD")
        cell.PAD = 0.03
        if row == 0:
            cell.set_text_props(fontweight="bold")
        elif column > 1:
            cell.set_facecolor("#F6D5C4" if rows[row - 1][column].endswith("(wrong)") else "#D7EBE3")
    return save(drawn, path)

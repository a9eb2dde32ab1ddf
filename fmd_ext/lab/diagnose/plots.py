"""What attention does, in pictures: shares per layer, curves of a setting, and how sure an estimate of alpha is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fmd_ext.lab.plotting import COLOURS, LINES, MARKERS, NAMES, figure, save, styled

if TYPE_CHECKING:
    from fmd_ext.lab.diagnose.attention import AttentionShare, LayerShare

BRANCH_TITLES = {"visual": "visual branch", "audio": "audio branch"}


@styled
def share_per_layer(shares: Mapping[str, AttentionShare], path: str | Path) -> Path:
    """Stacked bars per layer of one token's attention, one panel per method, two for a method that forks.

    Args:
        shares: by the method's name.
        path: of the file to write; its suffix is the format.
    """
    panels = [panel for name, share in shares.items() for panel in _panels(name, share)]
    drawn, axes = figure(len(panels))
    hatched = False
    for ax, (title, layers, fork_layers) in zip(axes, panels, strict=True):
        numbers = [layer.layer + 1 for layer in layers]
        below = np.zeros(len(layers))
        for modality, colour in COLOURS.items():
            heights = np.array([getattr(layer, modality) * 100 for layer in layers])
            bars = ax.bar(numbers, heights, 0.86, below, color=colour, label=NAMES[modality], edgecolor="white")
            for bar, layer in zip(bars, layers, strict=True):
                if layer.branch != "all" and modality not in (layer.branch, "text"):
                    bar.set_hatch("////")  # keys of the modality that is masked in this branch
            below += heights
        if 0 < fork_layers:
            ax.axvline(fork_layers + 0.5, color="#333333", linestyle=(0, (4, 2)), linewidth=1.2)
            ax.annotate("merge", (fork_layers + 0.5, 101), ha="center", va="bottom", fontsize=8, annotation_clip=False)
            hatched = True
        ax.set(xlabel="decoder layer", ylim=(0, 100), xlim=(0.4, len(layers) + 0.6))
        ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        ax.set_title(title, pad=15)
    axes[0].set_ylabel("attention of the last\nquestion token (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    if hatched:
        handles.append(axes[0].bar([0], [0], color="#D8D8D8", hatch="////", edgecolor="white"))
        labels.append("masked in this branch")
    drawn.legend(handles, labels, loc="outside lower center", ncols=4)
    return save(drawn, path)


def _panels(name: str, share: AttentionShare) -> list[tuple[str, list[LayerShare], int]]:
    """Titles, one row per layer, and the number of forked layers."""
    merged = [layer for layer in share.layers if layer.branch == "all"]
    forked = {branch: [layer for layer in share.layers if layer.branch == branch] for branch in BRANCH_TITLES}
    if not any(forked.values()):
        return [(name, merged, 0)]
    return [(f"{name}: {BRANCH_TITLES[branch]}", own + merged, len(own)) for branch, own in forked.items() if own]


@dataclasses.dataclass(frozen=True)
class Curve:
    """Accuracy against the values of a setting, with the bounds of its interval; all between 0 and 1.

    ``x`` are numbers; ``baseline``: accuracy without the method.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    baseline: float | None = None


@styled
def curves(
    panels: Mapping[str, Sequence[Curve]], path: str | Path, *, chosen: Mapping[str, float] | None = None
) -> Path:
    """One panel per setting (the key is its axis label), one line per curve with its interval as a band.

    ``chosen``: the value of a setting that is in force, marked by a vertical line.
    """
    drawn, axes = figure(len(panels), width=3.8)
    for ax, (label, lines) in zip(axes, panels.items(), strict=True):
        for index, curve in enumerate(lines):
            colour, marker = LINES[index % len(LINES)], MARKERS[index % len(MARKERS)]
            x, y, low, high = (np.asarray(v, float) for v in (curve.x, curve.y, curve.low, curve.high))
            ax.fill_between(x, low * 100, high * 100, color=colour, alpha=0.15, linewidth=0)
            ax.plot(x, y * 100, color=colour, marker=marker, markersize=4.5, linewidth=1.6, label=curve.name)
            if curve.baseline is not None:
                ax.axhline(curve.baseline * 100, color=colour, linestyle=(0, (1, 1.5)), linewidth=1.3)
        if chosen and label in chosen:
            ax.axvline(chosen[label], color="#333333", linestyle=(0, (4, 2)), linewidth=1.0)
        ax.set(xlabel=label)
        ax.grid(axis="y")
    axes[0].set_ylabel("accuracy (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    if any(curve.baseline is not None for lines in panels.values() for curve in lines):
        handles.append(_dotted(axes[0]))
        labels.append("vanilla")
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5))
    return save(drawn, path)


@styled
def alpha_reliability(alphas: Any, path: str | Path) -> Path:
    """How an estimate of alpha settles: per-sample values, and their mean with its 95 % interval as samples come in.

    Args:
        alphas: [samples, 2], of video and of audio, in the order in which they were measured.
    """
    alphas = np.asarray(alphas, float)
    drawn, (left, right) = figure(2, width=4.0)
    counts = np.arange(1, len(alphas) + 1)
    bins = np.linspace(0, 1, 41)
    for index, modality in enumerate(("visual", "audio")):
        values, colour = alphas[:, index], COLOURS[modality]
        mean = values.cumsum() / counts
        spread = np.sqrt(np.maximum((values**2).cumsum() / counts - mean**2, 0) * counts / np.maximum(counts - 1, 1))
        reach = 1.96 * spread / np.sqrt(counts)
        low, high = (np.clip(mean + side * reach, 0, 1)[1:] for side in (-1, 1))
        left.fill_between(counts[1:], low, high, color=colour, alpha=0.2, linewidth=0)
        left.plot(counts, mean, color=colour, linewidth=1.8, linestyle=("-", "--")[index], label=NAMES[modality])
        right.hist(values, bins, orientation="horizontal", color=colour, alpha=0.55, label=NAMES[modality])
        right.axhline(mean[-1], color=colour, linewidth=1.8, linestyle=("-", "--")[index])
    left.set(xlabel="prompts", ylabel="alpha", title="mean and 95 % interval", ylim=(0, 1))
    right.set(xlabel="number of prompts", title="single prompts, and their mean")
    left.grid(axis="y")
    drawn.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return save(drawn, path)


def _dotted(ax: Any) -> Any:
    (line,) = ax.plot([], [], color="#333333", linestyle=(0, (1, 1.5)), linewidth=1.3)
    return line

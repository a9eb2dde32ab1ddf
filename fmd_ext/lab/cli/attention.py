"""The table of where a question looks, as ``fmd-ext demo`` and ``fmd-ext diagnose`` print it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fmd_ext.lab.diagnose import AttentionShare

_BRANCH_TITLES = {"visual": "visual branch", "audio": "audio branch", "all": "merged"}


def show_attention(console: Console, shares: dict[str, AttentionShare]) -> None:
    """Where the last question token looks: the mean over all layers, and that over the layers of each branch."""
    table = Table(title="attention of the last question token, mean over heads and layers", title_justify="left")
    table.add_column("")
    for name in ("layers", "video", "audio", "text"):
        table.add_column(name, justify="right")
    for name, share in shares.items():
        for branch in (None, *(share.branches if share.branches != ("all",) else ())):
            layers = sorted({layer.layer for layer in share.layers if branch in (None, layer.branch)})
            span = f"{layers[0] + 1}" if len(layers) == 1 else f"{layers[0] + 1}-{layers[-1] + 1}"
            mean = share.mean(branch)
            title = name if branch is None else f"  {_BRANCH_TITLES[branch]}"
            table.add_row(title, span, *(f"{mean[modality]:.1%}" for modality in ("visual", "audio", "text")))
    console.print(table)

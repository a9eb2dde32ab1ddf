"""The plots hold what they are given: SVG keeps texts as texts, so that they can be read back."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

from fmd_ext.lab.diagnose import AttentionShare, LayerShare
from fmd_ext.lab.diagnose.plots import Curve, alpha_reliability, curves, share_per_layer
from fmd_ext.lab.plotting import COLOURS


def texts(path):
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


def share(num_forked):
    layers = [
        LayerShare(layer, branch, 0.25, 0.25, 0.5)
        for layer in range(3)
        for branch in (("visual", "audio") if layer < num_forked else ("all",))
    ]
    return AttentionShare(tuple(layers))


def test_shares_have_a_panel_per_branch(tmp_path):
    path = share_per_layer({"vanilla": share(0), "FMD": share(2)}, tmp_path / "new" / "share.svg")
    found = texts(path)
    assert {"vanilla", "FMD: visual branch", "FMD: audio branch", "masked in this branch", "decoder layer"} <= set(
        found
    )
    assert found.count("merge") == 2
    svg = path.read_text().lower()
    assert all(colour.lower() in svg for colour in COLOURS.values())
    plain = texts(share_per_layer({"vanilla": share(0)}, tmp_path / "plain.svg"))
    assert "merge" not in plain and "masked in this branch" not in plain


def test_curves_name_their_lines_and_settings(tmp_path):
    line = Curve("AV Matching", [1, 2], [0.6, 0.7], [0.55, 0.6], [0.65, 0.8], baseline=0.5)
    path = curves({"fork layers": [line], "alpha": [line]}, tmp_path / "curves.svg", chosen={"alpha": 1.5})
    assert {"fork layers", "alpha", "AV Matching", "vanilla", "accuracy (%)"} <= set(texts(path))
    path = curves({"alpha": [Curve("all", [0, 1], [0.5, 0.6], [0.4, 0.5], [0.6, 0.7])]}, tmp_path / "one.svg")
    assert "vanilla" not in texts(path)


def test_reliability_of_alpha_is_a_picture(tmp_path):
    path = alpha_reliability(np.linspace([0.5, 0.6], [0.9, 0.8], 20), tmp_path / "alpha.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'fmd-ext\[plots\]'"):
        share_per_layer({"vanilla": share(0)}, tmp_path / "share.svg")

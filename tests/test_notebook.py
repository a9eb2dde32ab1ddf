"""docs/notebook.ipynb runs from top to bottom, without a network, and shows what it says."""

from __future__ import annotations

import json
import re

import pytest
import torch

from paths import ROOT


def cells(kind):
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_it_runs_from_top_to_bottom(monkeypatch, capsys):
    pytest.importorskip("torchvision")  # the model's processor needs it
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(ROOT / "docs")
    names: dict[str, object] = {"__name__": "__main__"}
    with torch.enable_grad():  # as a notebook starts
        for number, source in enumerate(cells("code")):
            exec(compile(source, f"notebook.ipynb, cell {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert "attention runs on:" in printed and "0.0 with 0 fork layers" in printed
    assert (names["forked"] - names["vanilla"]).abs().max() > 0.1
    vanilla, forked = (names["shares"][name].branches for name in ("vanilla", "forked"))
    assert vanilla == ("all",) and set(forked) == {"visual", "audio", "all"}
    assert set(names["answers"]) == {"vanilla", "forked"} and all(names["answers"].values())


def test_its_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", "\n".join(cells("markdown")))
    assert targets and [t for t in targets if not (ROOT / "docs" / t).exists()] == []

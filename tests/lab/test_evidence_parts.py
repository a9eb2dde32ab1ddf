"""Parts of the evidence that go on from the recorded comparison: a probe in place of asking, and exact answers."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration

import fmd_ext
from fmd_ext.engine.routes import NEEDS
from fmd_ext.lab import trained
from fmd_ext.lab.evidence import __main__ as command
from fmd_ext.lab.evidence import exact, probe
from fmd_ext.lab.evidence.prompts import WholePrompts
from fmd_ext.lab.evidence.rivals import BY_TRUTH, ROUTED, Rival, rivals
from fmd_ext.lab.evidence.rivals_page import rivals_lines
from fmd_ext.lab.synthetic import split_scenes
from fmd_ext.lab.synthetic.dataset import BALANCED
from fmd_ext.lab.training.pool import build_pool
from paths import ROOT

CLIPS = 8
ROUTED_SETTINGS = {"masking": "attention", "fork_layers": 2, "text_weight": {"visual": 0.8, "audio": 0.2}}


@pytest.fixture(scope="module")
def model():
    return Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(trained.MODEL).eval()


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    processor, scenes = AutoProcessor.from_pretrained(trained.MODEL), split_scenes("val", CLIPS, BALANCED)
    return processor, build_pool(tmp_path_factory.mktemp("pool"), processor, scenes), scenes


def test_a_probe_finds_what_separates_its_labelled_states():
    generator = torch.Generator().manual_seed(0)
    centres, needs = torch.eye(3, 8) * 4, list(NEEDS) * 5
    states = centres.repeat(5, 1) + torch.randn(15, 8, generator=generator)
    routes = probe.LinearProbe.fitted(states, needs).routes(centres + 0.1)
    assert routes.argmax(1).tolist() == [0, 1, 2] and np.allclose(routes.sum(1), 1, atol=1e-5)
    shuffled = probe.LinearProbe.fitted(states, needs[1:] + needs[:1]).routes(centres + 0.1)
    assert shuffled.argmax(1).tolist() == [1, 2, 0]


def test_a_probe_is_judged_on_prompts_that_it_was_not_fitted_to(model, made, monkeypatch):
    """The package's model answers what is asked, so its state tells the need in prompts of other templates too."""
    processor, pool, scenes = made
    questions = WholePrompts(model, processor, pool, scenes, ["avhbench"])
    fitted = []
    monkeypatch.setattr(probe, "DRAWS", 1)
    drawn = probe._drawn
    monkeypatch.setattr(probe, "_drawn", lambda *args: fitted.append(drawn(*args)) or fitted[-1])
    found = probe.measure_probe(model, questions, scenes, ROUTED_SETTINGS)
    assert found["asked"]["right"] == 1 and found["layer"] == 3 and found["clips"] == CLIPS
    for kind, labelled in zip((probe.SAME, probe.OTHER), fitted, strict=True):
        assert found[kind]["labelled"] == len(labelled) == {probe.SAME: 5, probe.OTHER: 15}[kind]
        assert found[kind]["right"] == [1.0]
        counted = sum(text not in labelled for text in questions.texts)
        assert sum(row["items"] for row in found[kind]["routed"]) == counted
        assert all(row["value"] == 0 for row in found[kind]["routed"])  # the same routes to within rounding
    assert not set(fitted[1]) & set(questions.texts)


def test_exact_answers_are_those_of_each_method(model, made, monkeypatch):
    questions = WholePrompts(model, *made, exact.FAMILIES)
    assert {exact.group_of(item) for item in questions.items} <= set(exact.GROUPS)
    routed = {rival.name: rival for rival in rivals(6)}[ROUTED]
    few = [Rival("vanilla", [{}], lambda model, asked, s, limit=None: asked.ask(model)), routed]
    monkeypatch.setattr(exact, "rivals", lambda layers: few)
    found = exact.measure_exact(model, questions, {"vanilla": {}, ROUTED: ROUTED_SETTINGS})
    with fmd_ext.patch(model, processor=made[0], **ROUTED_SETTINGS):
        right, _ = questions.ask(model)
    rows = [row for row in found["methods"] if row["name"] == ROUTED]
    assert [row["group"] for row in rows] == list(exact.GROUPS) and sum(row["items"] for row in rows) == len(right)
    for row in rows:
        own = np.array([exact.group_of(item) == row["group"] for item in questions.items])
        assert row["value"] == pytest.approx(right[own].mean(), abs=1e-4) and row["items"] == own.sum()
    before, _ = questions.ask(model)
    gained = sum(row["difference"] * row["items"] for row in rows) / len(right)
    assert gained == pytest.approx((right - before).mean(), abs=1e-3)


def test_a_part_is_added_to_the_record_and_nothing_else_changes(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "data").mkdir()
    for name in ("evidence.json", "training.jsonl"):
        (tmp_path / "data" / name).write_text((ROOT / "docs" / "data" / name).read_text())
    before = json.loads((tmp_path / "data" / "evidence.json").read_text())
    asked = []
    monkeypatch.setattr(command, "measured", lambda *args: asked.append(args) or before["probe"])
    arguments = ["evidence", "--docs", str(tmp_path), "--part", "probe", "--model", "seed 1=/somewhere"]
    monkeypatch.setattr(sys, "argv", arguments)
    command.main()
    after = json.loads((tmp_path / "data" / "evidence.json").read_text())
    ((part, folder, _, recorded, clips),) = asked
    assert (part, str(folder), clips) == ("probe", "/somewhere", (60, 300))
    assert recorded == before["models"][0]["rivals"]
    assert after["models"][0].pop("probe") == before["probe"] and after == before


def test_the_record_has_the_parts_and_the_page_shows_them():
    found = json.loads((ROOT / "docs" / "data" / "evidence.json").read_text())
    control = next(model for model in found["models"] if model["name"] == "never asked")
    page = "\n".join(rivals_lines(found))
    for name, record in (("the package's", found["probe"]), ("never asked", control["probe"])):
        for kind in (probe.SAME, probe.OTHER):
            assert len(record[kind]["right"]) == probe.DRAWS
            assert all(row["p_adjusted"] >= row["p_value"] for row in record[kind]["routed"])
            assert f"| {name} | probe, {kind} | {record[kind]['labelled']} |" in page
    assert BY_TRUTH in {row["name"] for row in found["rivals"]["methods"]}

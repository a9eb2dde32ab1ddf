"""The evidence: answers from a cache are those of whole prompts, how settings are chosen, the page."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration

import fmd_ext
from fmd_ext.config import FMDConfig
from fmd_ext.engine.reference import reference_hidden
from fmd_ext.lab import trained
from fmd_ext.lab.evidence import measure
from fmd_ext.lab.evidence.answers import YesNoQuestions, scores
from fmd_ext.lab.evidence.measure import DISAGREEING, GROUPS, TASKS, attention_before_and_after, choose, of_group
from fmd_ext.lab.evidence.page import write_page
from fmd_ext.lab.synthetic import split_scenes
from fmd_ext.lab.synthetic.dataset import BALANCED
from fmd_ext.lab.training.pool import build_pool
from paths import ROOT

DOCS = ROOT / "docs"
CLIPS = 24


@pytest.fixture(scope="module")
def model():
    return Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(trained.MODEL).eval()


@pytest.fixture(scope="module")
def questions(model, tmp_path_factory):
    processor = AutoProcessor.from_pretrained(trained.MODEL)
    scenes = split_scenes("val", CLIPS, BALANCED)
    return YesNoQuestions(model, processor, build_pool(tmp_path_factory.mktemp("pool"), processor, scenes), scenes)


def test_the_questions_are_those_of_the_three_tasks(questions):
    assert {item.task for item in questions.items} == set(TASKS)
    assert {item.clip for item in questions.items} == set(range(CLIPS))
    matching = [item.answer for item in questions.items if item.task == TASKS[2]]
    assert np.mean(matching) == 0.5
    agreeing = of_group(questions.items, TASKS[0]) & ~of_group(questions.items, GROUPS[3])
    assert {item.relation for item, a in zip(questions.items, agreeing, strict=True) if a} == {"matched"}


@pytest.mark.parametrize(
    "settings",
    [
        {"fork_layers": 0},
        {"masking": "zero", "fork_layers": 3, "alpha": 0.7, "mask_scale": 0.2},
        {"masking": "attention", "fork_layers": 4},
    ],
    ids=str,
)
def test_answers_from_the_shared_cache_equal_two_plain_passes(questions, model, settings):
    """Every tenth question by the reference: whole prompt, no cache, no packing."""
    config = FMDConfig(**settings).resolve(FMDConfig(), 6)
    with fmd_ext.patch(model, config):
        margins = questions.ask(model)
    decoder = fmd_ext.adapters.find_adapter(model).find_decoder(model)
    checked = 0
    for task in TASKS:
        count = sum(item.task == task for item in questions.items)
        for number, _, inputs in questions.prompts(model, task, count):
            if checked % 10 == 0:
                hidden = reference_hidden(
                    decoder, config, inputs["inputs_embeds"], inputs["modality_labels"], inputs["position_ids"]
                )
                yes, no = model.get_output_embeddings()(hidden[0, -1])[questions.words].tolist()
                assert margins[number] == pytest.approx(yes - no, abs=2e-3)
            checked += 1
    assert checked == len(questions.items)


def test_what_the_branches_know_and_what_the_merge_makes_of_it(questions, model):
    """Margins that a broken fork or merge would miss; docs/evidence.md has the accuracies on a thousand clips."""

    def accuracy(group, **settings):
        chosen = of_group(questions.items, group)
        if not settings:
            return scores(questions.items, questions.ask(model))[chosen].mean()
        with fmd_ext.patch(model, **settings):
            return scores(questions.items, questions.ask(model))[chosen].mean()

    sound, picture = (task + DISAGREEING for task in TASKS[:2])
    alone = {"masking": "attention", "fork_layers": 6}
    # The audio branch hears what the unpatched model takes from the picture; the visual one sees and is deaf.
    assert accuracy(sound, **alone, text_weight=0.0) > accuracy(sound) + 0.1
    assert accuracy(sound, **alone, text_weight=1.0) < accuracy(sound) - 0.1
    assert accuracy(picture, **alone, text_weight=1.0) > accuracy(picture, **alone, text_weight=0.0) + 0.2
    # Who compares must know both: an early merge keeps that, a late one loses it.
    assert accuracy(TASKS[2], masking="attention", fork_layers=1) > 0.85
    assert accuracy(TASKS[2], masking="zero", fork_layers=6) < 0.7


def test_the_model_is_good_where_nothing_misleads_and_biased_where_something_does(questions, model):
    matched = np.array([item.relation == "matched" for item in questions.items])
    swapped = np.array([item.relation == "swapped" for item in questions.items])
    sound = of_group(questions.items, TASKS[0])
    right = scores(questions.items, questions.ask(model))
    assert right[matched].mean() > 0.95
    assert right[sound & swapped].mean() < right[sound & matched].mean() - 0.15
    with fmd_ext.patch(model, FMDConfig.from_file(trained.SETTINGS)):
        forked = scores(questions.items, questions.ask(model))
    assert forked[matched].mean() > 0.9


def test_settings_are_chosen_by_the_mean_over_tasks(questions, model, monkeypatch):
    grid = [{"masking": "zero", "fork_layers": depth, "alpha": 0.8} for depth in (1, 6)]
    monkeypatch.setattr(measure, "zero_grid", lambda layers: grid)
    monkeypatch.setattr(measure, "attention_grid", lambda layers: [{"masking": "attention", "fork_layers": 1}])
    found = choose(questions, model)
    reached = []
    for settings in grid:
        with fmd_ext.patch(model, **settings):
            right = scores(questions.items, questions.ask(model))
        reached.append(np.mean([right[of_group(questions.items, task)].mean() for task in TASKS]))
    assert found["zero"]["settings"] == grid[int(np.argmax(reached))]
    assert found["zero"]["accuracy"] == pytest.approx(max(reached))
    assert found["attention"]["settings"]["masking"] == "attention" and found["clips"] == CLIPS


def test_attention_shares_before_and_after(questions, model):
    rows = attention_before_and_after(questions, model, [{"masking": "attention", "fork_layers": 2}], prompts=2)
    assert [row["branch"] for row in rows] == ["all"] * 6 + ["visual", "audio"] * 2 + ["all"] * 4
    assert all(row["visual"] + row["audio"] + row["text"] == pytest.approx(1, abs=1e-5) for row in rows)
    assert all(row["audio"] == 0 for row in rows if row["branch"] == "visual")


def test_the_page_is_the_one_that_the_recorded_data_give(tmp_path):
    pytest.importorskip("matplotlib")
    found = json.loads((DOCS / "data" / "evidence.json").read_text())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "training.jsonl").write_text((DOCS / "data" / "training.jsonl").read_text())
    write_page(found, tmp_path)
    assert (tmp_path / "evidence.md").read_text() == (DOCS / "evidence.md").read_text()
    for image in (DOCS / "images").glob("evidence_*.png"):
        assert (tmp_path / "images" / image.name).read_bytes().startswith(b"\x89PNG")
    assert FMDConfig.from_file(trained.SETTINGS).masking in found["chosen"]


def test_the_record_is_large_enough_and_of_this_model(model):
    found = json.loads((DOCS / "data" / "evidence.json").read_text())
    assert found["parameters"] == model.num_parameters()
    assert found["test"]["clips"] >= 500
    assert all(found["test"]["vanilla"][task]["items"] >= 2000 for task in TASKS)
    assert torch.tensor([row["p_adjusted"] >= row["p_value"] for row in found["test"]["comparisons"]]).all()

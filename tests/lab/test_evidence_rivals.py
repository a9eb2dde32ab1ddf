"""The comparison with rivals: whole prompts, costs, how settings are chosen, what the page says of the record."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration

import fmd_ext
from fmd_ext.lab import trained
from fmd_ext.lab.evidence import rivals
from fmd_ext.lab.evidence.alternatives import measure_alternatives, told_apart
from fmd_ext.lab.evidence.answers import YesNoQuestions, scores
from fmd_ext.lab.evidence.prompts import WholePrompts
from fmd_ext.lab.evidence.rivals import GROUPS, ROUTED, Rival, best_of, group_of, macro, measure_rivals, routes_of
from fmd_ext.lab.evidence.rivals_page import rivals_lines
from fmd_ext.lab.synthetic import split_scenes
from fmd_ext.lab.synthetic.dataset import BALANCED
from fmd_ext.lab.training.pool import build_pool
from paths import ROOT

CLIPS = 12
LAYERS = 6


@pytest.fixture(scope="module")
def model():
    return Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(trained.MODEL).eval()


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    processor, scenes = AutoProcessor.from_pretrained(trained.MODEL), split_scenes("val", CLIPS, BALANCED)
    return processor, build_pool(tmp_path_factory.mktemp("pool"), processor, scenes), scenes


@pytest.fixture(scope="module")
def questions(model, made):
    return WholePrompts(model, *made, ["avhbench"])


def test_whole_prompts_are_answered_as_from_the_shared_cache(model, made, questions):
    shared = YesNoQuestions(model, *made)
    for settings in (None, {"masking": "attention", "fork_layers": 3}):
        if settings is None:
            expected, right = shared.ask(model), questions.ask(model)[0]
        else:
            with fmd_ext.patch(model, **settings):
                expected, right = shared.ask(model), questions.ask(model)[0]
        sure = np.abs(expected) > 0.05  # a margin of nothing may tip by rounding
        assert sure.mean() > 0.9
        known = sorted(zip(map(str, shared.items), scores(shared.items, expected), strict=True))
        found = sorted(zip(map(str, questions.items), right, strict=True))
        assert sum(a != b for a, b in zip(known, found, strict=True)) <= (~sure).sum()


def test_costs_are_multiples_of_vanillas(model, questions):
    _, vanilla = questions.ask(model)
    batches = len(questions.batches(np.ones(len(questions.items), bool)))
    assert vanilla.passes == batches and vanilla.layer_rows % LAYERS == 0 and vanilla.seconds > 0
    with fmd_ext.patch(model, masking="zero", fork_layers=LAYERS):
        _, twice = questions.ask(model)
    few, limited = questions.ask(model, limit=2)
    assert limited.passes == 2 and limited.questions < vanilla.questions == len(questions.items)
    assert twice.passes == batches and 1.5 < twice.layer_rows / vanilla.layer_rows < 2
    alone = questions.ask(model, ["audio"] * len(questions.items))[1]
    assert alone.layer_rows < vanilla.layer_rows


def test_dropping_a_sense_by_truth_is_a_prompt_without_it(model, questions):
    """Of a question about the sound the picture is not in the prompt."""
    numbers = np.flatnonzero([need == "audio" for need in questions.needs])[:3]
    for senses, names in (("audio", {"input_features"}), ("video", {"pixel_values_videos"}), ("both", None)):
        given = questions.inputs(numbers[:1], senses)
        assert names is None or names == {"input_features", "pixel_values_videos"} & given.keys()
    right, _ = rivals._drop_by_truth(model, questions, {})
    for number in numbers:
        logits = model(**questions.inputs(np.array([number]), "audio")).logits[0, -1, questions.words]
        assert right[number] == (("yes", "no")[logits.argmax()] == ("yes" if questions.items[number].answer else "no"))


def test_routing_by_truth_gives_each_question_its_branch(model, questions):
    """With all layers forked the answer is one branch's; with attention masking that branch sees one sense only."""
    settings = {"masking": "attention", "fork_layers": LAYERS}
    with rivals._routed_by_truth(model, questions, text_weight="auto", **settings):
        right, _ = questions.ask(model)
    by_need = {}
    for need, weight in (("video", 1.0), ("audio", 0.0)):
        with fmd_ext.patch(model, text_weight=weight, **settings):
            by_need[need] = questions.ask(model)[0]
    by_need["both"] = questions.ask(model)[0]
    expected = [by_need[need][number] for number, need in enumerate(questions.needs)]
    assert right.tolist() == expected


def test_the_model_knows_what_a_question_needs(model, questions):
    likeliest = routes_of(model, questions).probabilities.argmax(1)
    truth = [rivals.NEEDS.index(rivals.NEED_OF[need]) for need in questions.needs]
    assert np.mean(likeliest == truth) > 0.95


def test_settings_are_chosen_on_validation_and_judged_on_test(model, questions, monkeypatch):
    """By the mean over groups; the test questions are not looked at before."""
    order = []

    def ask(model, asked, settings, limit=None):
        if limit is None:
            order.append((asked is questions, settings))
        right, cost = asked.ask(model, limit=limit)
        return right * (settings.get("gamma") != 1.0), cost

    test = questions
    validation = WholePrompts.__new__(WholePrompts)
    validation.__dict__.update(questions.__dict__)
    few = [
        Rival("vanilla", [{}], ask),
        Rival(ROUTED, [{"gamma": 1.0}, {"gamma": 2.0}], ask),
        Rival("MAD", [{}], ask),
    ]
    monkeypatch.setattr(rivals, "rivals", lambda layers: few)
    found = measure_rivals(model, validation, test)
    assert [row["settings"] for row in found["methods"]] == [{}, {"gamma": 2.0}, {}]
    assert order == [(True, {}), (False, {"gamma": 1.0}), (False, {"gamma": 2.0}), (True, {"gamma": 2.0}), (True, {})]
    assert all(0.2 < row["time"] < 5 for row in found["methods"])  # they do the same here
    assert len(found["against_vanilla"]) == 2 * len(GROUPS) and len(found["against_mad"]) == len(GROUPS)
    assert all(row["value"] == 0 and row["p_adjusted"] == 1 for row in found["against_mad"])


def test_settings_that_harm_a_group_are_taken_only_where_all_do(questions):
    items = questions.items
    groups = np.array([group_of(item) for item in items])
    vanilla = (groups != GROUPS[1]).astype(float)
    harmful = (groups != GROUPS[0]).astype(float) + (groups == GROUPS[0]) * (np.arange(len(items)) % 3 > 0)
    harmless = vanilla.copy()
    harmless[np.flatnonzero(groups == GROUPS[1])[:2]] = 1
    assert macro(items, harmful) > macro(items, harmless)
    assert best_of(items, vanilla, [vanilla, harmful, harmless]) == 2
    assert best_of(items, vanilla, [harmful * 0, harmful]) == 1


def test_groups_count_alike(questions):
    right = np.array([group_of(item) == GROUPS[0] for item in questions.items], float)
    assert macro(questions.items, right) == pytest.approx(1 / len(GROUPS))


def test_the_record_is_whole_and_the_verdict_is_its():
    found = json.loads((ROOT / "docs" / "data" / "evidence.json").read_text())
    names = {rival.name for rival in rivals.rivals(LAYERS)}
    for record in (found["rivals"], *(model["rivals"] for model in found["models"])):
        assert {row["name"] for row in record["methods"]} == names
        assert all(row["groups"].keys() == set(GROUPS) for row in record["methods"])
    assert len(found["models"]) >= 3 and found["rivals"]["clips"] >= 500
    text = " ".join(rivals_lines(found))
    row = next(r for r in found["rivals"]["against_vanilla"] if (r["name"], r["group"]) == (ROUTED, GROUPS[1]))
    reached = all(
        r["value"] >= 0.1
        for r in found["rivals"]["against_vanilla"]
        if r["name"] == ROUTED and r["group"] in (GROUPS[1], GROUPS[3])
    )
    assert f"Gained: {100 * row['value']:.1f} points on sound" in text
    assert ("(not reached)" in text.split("Gained:")[1].split("Worse than vanilla")[0]) != reached


def test_samples_are_told_apart_by_the_best_threshold():
    assert told_apart(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 1
    assert told_apart(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1
    assert told_apart(np.array([1.0, 3.0]), np.array([2.0, 4.0])) == 0.75
    assert told_apart(np.array([1.0, 1.0]), np.array([1.0, 1.0])) == 0.5


def test_alternatives_to_asking(model, made):
    shared = YesNoQuestions(model, *made)
    found = measure_alternatives(shared, model, prompts=3)
    alone = {}
    for weight in (0.0, 1.0):
        with fmd_ext.patch(model, masking="attention", fork_layers=LAYERS, text_weight=weight):
            alone[weight] = shared.ask(model)
    hits = [
        (max((alone[0.0][i], alone[1.0][i]), key=abs) > 0) == item.answer
        for i, item in enumerate(shared.items)
        if group_of(item) == GROUPS[1]
    ]
    assert found["confidence"][GROUPS[1]] == pytest.approx(np.mean(hits), abs=1e-4)
    assert 0.5 <= found["attention"]["told_apart"] <= 1

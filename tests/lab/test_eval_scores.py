"""Tables from predictions: against counts by hand, in pairs, and without a model."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from fmd_ext.lab.eval import captions, statistics
from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.predictions import Prediction, Results, ResultsError, Share
from fmd_ext.lab.eval.scores import ALL, evaluate, write_scores
from fmd_ext.lab.eval.wording import caption_against, reading_lines, short_names

TASKS = ("AV Matching", "Audio-driven Video Hallucination")


def make(folder, answers, *, benchmark="avhbench", items=None, samples=1, **more):
    """A results folder in which each method says ``answers[method][i]`` about item i."""
    count = len(next(iter(answers.values())))
    items = items or [
        Item(f"i{i}", f"v{i // 2}", None, "Is it?", "yes-no", "yes" if i % 2 else "no", (), {"task": TASKS[i % 4 // 2]})
        for i in range(count)
    ]
    results = Results(folder)
    results.begin({"benchmark": benchmark}, items)
    with Share(results.share_path(0, 1)) as share:
        for method, texts in answers.items():
            for item, text in zip(items, texts, strict=False):
                for sample in range(samples):
                    said = text if samples == 1 or text is None else text[sample]
                    share.append(
                        [
                            Prediction(
                                method,
                                item.id,
                                sample,
                                item.prompt,
                                said,
                                tokens=2,
                                first_token_s=0.1 if method == "vanilla" else 0.2,
                                seconds=0.5,
                                error="broken" if said is None else None,
                                **more,
                            )
                        ]
                    )
    return results


def test_against_counts_by_hand(tmp_path):
    rng = np.random.default_rng(0)
    texts = {method: rng.choice(["Yes.", "No, never", "I don't know"], 40).tolist() for method in ("vanilla", "fmd")}
    evaluation = evaluate(make(tmp_path, texts))
    assert evaluation.methods == ["vanilla", "fmd"] and evaluation.counts.answered == 40
    truth = np.array([i % 2 == 1 for i in range(40)])
    videos = [f"v{i // 2}" for i in range(40)]
    right = {}
    for method in texts:
        yes, no = (np.array([text.startswith(word) for text in texts[method]]) for word in ("Yes", "No"))
        right[method] = (yes & truth) | (no & ~truth)
        cell = evaluation.tables[0].rows[ALL][method]
        assert cell.accuracy == statistics.proportion(right[method], videos)
        assert cell.unparsed == pytest.approx((~yes & ~no).mean())
        precision, recall = (yes & truth).sum() / yes.sum(), (yes & truth).sum() / truth.sum()
        assert cell.yes_no["precision"].value == pytest.approx(precision)
        assert cell.yes_no["recall"].value == pytest.approx(recall)
        assert cell.yes_no["f1"].value == pytest.approx(2 * precision * recall / (precision + recall))
        assert cell.yes_no["yes_rate"].value == pytest.approx(yes.mean())
        by_task = evaluation.tables[1].rows
        tasks = np.array([TASKS[i % 4 // 2] for i in range(40)])
        shares = [right[method][tasks == task].mean() for task in by_task]
        assert [by_task[task][method].accuracy.value for task in by_task] == pytest.approx(shares)
        assert evaluation.averages["task"][method].value == pytest.approx(np.mean(shares))
    cell = evaluation.tables[0].rows[ALL]["fmd"]
    assert cell.comparison == statistics.compare(right["fmd"], right["vanilla"], videos)
    assert cell.adjusted_p == cell.comparison.p_value  # one comparison in its table
    flips = evaluation.flips["fmd"]
    assert flips["gained"] == [f"i{i}" for i in range(40) if right["fmd"][i] > right["vanilla"][i]]
    assert len(flips["lost"]) == cell.comparison.lost
    assert evaluation.items_needed["fmd"]["0.05"] > evaluation.items_needed["fmd"]["0.05"] / 2 > 10
    assert evaluation.speed["fmd"]["first_token_ratio"] == pytest.approx(2)


def test_p_values_are_adjusted_within_their_table(tmp_path):
    answers = {"vanilla": ["Yes", "No"] * 20, "a": ["No", "Yes"] * 20, "b": ["Yes"] * 40}
    for table in evaluate(make(tmp_path, answers)).tables:
        cells = [cell for row in table.rows.values() for cell in row.values() if cell.comparison]
        expected = statistics.holm([cell.comparison.p_value for cell in cells])
        assert [cell.adjusted_p for cell in cells] == expected and len(cells) == 2 * len(table.rows)
        assert any(cell.adjusted_p > cell.comparison.p_value for cell in cells)


def test_methods_are_compared_on_what_all_have_answered(tmp_path):
    evaluation = evaluate(make(tmp_path, {"fmd": ["Yes"] * 3 + [None], "vanilla": ["Yes", "No", None, "Yes"]}))
    assert evaluation.methods == ["vanilla", "fmd"]  # the baseline first
    counts = evaluation.counts
    assert (counts.asked, counts.answered, counts.failed, counts.unfinished) == (4, 2, 2, 0)
    assert counts.reasons == {"broken": 2}
    assert evaluate(Results(tmp_path), baseline="fmd").methods == ["fmd", "vanilla"]
    with pytest.raises(ResultsError, match="no method 'avcd' in .*; there are fmd, vanilla"):
        evaluate(Results(tmp_path), baseline="avcd")


def test_what_was_never_asked_is_not_missing(tmp_path):
    """A limit, or an exclusion, is a choice and not a failure; what was asked and has no answer yet is unfinished."""
    results = make(tmp_path, {"vanilla": ["Yes", "No", None, "Yes"], "fmd": ["Yes", "No", "Yes"]})
    assert evaluate(results).counts.unfinished == 1
    items = results.items()
    results.record_selection(items, excluded=["i3"])
    counts = evaluate(results).counts
    assert (counts.asked, counts.answered, counts.failed, counts.unfinished, counts.excluded) == (3, 2, 1, 0, 1)
    assert counts.lines() == [
        "2 of 3 questions answered by every method, 1 failed",
        "left out: 1 excluded by hand",
        "1 answers are missing: broken",
    ]


def test_notes_are_counted_by_method(tmp_path):
    results = make(tmp_path, {"vanilla": ["Yes", "No"], "fmd": ["Yes", "No"]}, notes={"answer cut off": "after 2"})
    assert evaluate(results).counts.notes == {"answer cut off": {"vanilla": 2, "fmd": 2}}


def test_samples_are_averaged_within_their_item(tmp_path):
    evaluation = evaluate(make(tmp_path, {"vanilla": [("Yes", "No")] * 6, "fmd": [("Yes", "Yes")] * 6}, samples=2))
    cells = evaluation.tables[0].rows[ALL]
    assert cells["vanilla"].accuracy.value == 0.5 and cells["vanilla"].accuracy.standard_error == 0
    assert cells["fmd"].accuracy.num_items == 6
    evaluation = evaluate(make(tmp_path / "half", {"vanilla": [("Yes", "Yes"), ("Yes", "hm")]}, samples=2))
    cell = evaluation.tables[0].rows[ALL]["vanilla"]
    assert (cell.accuracy.value, cell.unparsed) == (0.25, 0.25)  # the first item's answer is no, the second's yes


def test_groups_have_the_same_weight_in_their_mean(tmp_path):
    tasks = [TASKS[0]] * 9 + [TASKS[1]] * 3
    items = [
        Item(f"i{i}", f"v{i}", None, "Is it?", "yes-no", "yes", (), {"task": task}) for i, task in enumerate(tasks)
    ]
    evaluation = evaluate(make(tmp_path, {"vanilla": ["Yes"] * 6 + ["No"] * 3 + ["Yes"] * 3}, items=items))
    assert evaluation.tables[0].rows[ALL]["vanilla"].accuracy.value == pytest.approx(9 / 12)
    assert evaluation.averages["task"]["vanilla"].value == pytest.approx((6 / 9 + 1) / 2)


@pytest.mark.parametrize("together", [True, False])
def test_power_counts_questions_that_go_together(tmp_path, together):
    """Answers that change by video need more questions; those that change apart never fewer than independent ones."""
    changed = [i % 8 < 2 if together else i % 4 == i // 4 % 2 for i in range(240)]
    items = [Item(f"i{i}", f"v{i // 2}", None, "Is it?", "yes-no", "yes", (), {}) for i in range(240)]
    answers = {"vanilla": ["No"] * 240, "fmd": ["Yes" if change else "No" for change in changed]}
    evaluation = evaluate(make(tmp_path, answers, items=items))
    difference = evaluation.tables[0].rows[ALL]["fmd"].comparison.difference
    assert difference.design_effect > 1.5 if together else difference.design_effect < 0.8
    effect = difference.design_effect if together else 1.0
    needed = statistics.items_needed(0.05, sum(changed) / 240, design_effect=effect)
    assert evaluation.items_needed["fmd"]["0.05"] == needed
    shown = statistics.detectable_gain(240, sum(changed) / 240, design_effect=effect)
    assert evaluation.detectable["fmd"] == pytest.approx(shown)


def test_a_parser_that_learns_changes_the_scores(tmp_path, monkeypatch):
    results = make(tmp_path, {"vanilla": ["Oui", "Yes"]}, parsed="no", score=0.0)
    assert evaluate(results).tables[0].rows[ALL]["vanilla"].unparsed == 0.5
    monkeypatch.setattr("fmd_ext.lab.eval.scores.parse_answer", lambda item, text: "yes")
    assert evaluate(results).tables[0].rows[ALL]["vanilla"].unparsed == 0


def test_files_are_written_in_the_benchmarks_order(tmp_path):
    answers = {"vanilla": ["Yes", "No", "maybe", None], "fmd": ["Yes"] * 4}
    results = make(tmp_path / "one", answers)
    write_scores(results, evaluate(results))
    rows = [json.loads(line) for line in (results.folder / "predictions.jsonl").read_text().splitlines()]
    assert [row["item"] for row in rows] == ["i0", "i1", "i2", "i3"] * 2
    assert [row["parsed"] for row in rows[4:]] == ["yes", "no", None, None]
    assert rows[7]["error"] == "broken" and rows[7]["score"] is None
    other = make(tmp_path / "other", {name: answers[name] for name in ("fmd", "vanilla")}, batch=2)
    write_scores(other, evaluate(other))
    assert (other.folder / "predictions.jsonl").read_bytes() == (results.folder / "predictions.jsonl").read_bytes()
    scores = json.loads((results.folder / "scores.json").read_text())
    assert scores["tables"][0]["rows"]["all"]["fmd"]["accuracy"]["num_items"] == 3


def test_captions_are_scored_or_it_is_said_why_not(tmp_path):
    items = [Item(f"c{i}", f"v{i}", None, "Describe.", "caption", "a dog barks in the street") for i in range(3)]
    texts = ["A dog barks in the street.", "a cat", "dogs bark"]
    evaluation = evaluate(make(tmp_path, {"vanilla": texts, "fmd": texts[:1] * 3}, items=items))
    assert evaluation.tables == [] and evaluation.counts.answered == 3
    try:
        import pycocoevalcap  # noqa: F401
    except ImportError:
        assert evaluation.captions["vanilla"].startswith("not computed: needs pycocoevalcap")
    else:
        if shutil.which("java") is None:
            assert "Java" in evaluation.captions["vanilla"]
        else:
            cells = {method: evaluation.captions[method]["METEOR"] for method in ("vanilla", "fmd")}
            assert cells["fmd"].corpus > cells["vanilla"].corpus > 0
            assert cells["fmd"].comparison.gained == 2


def test_captions_are_compared_in_pairs(tmp_path, monkeypatch):
    """With made-up scores per caption: intervals over videos, and tests that are adjusted over the methods."""
    items = [Item(f"c{i}", f"v{i // 2}", None, "Describe.", "caption", "a dog") for i in range(12)]
    rng = np.random.default_rng(0)
    own = {method: rng.uniform(size=12) for method in ("vanilla", "fmd", "vcd")}

    def scored(references, said):
        assert references == ["a dog"] * 12
        return captions.CaptionScores({"CIDEr": 0.25}, {"CIDEr": own[said[0]]})

    monkeypatch.setattr("fmd_ext.lab.eval.scores.caption_scores", scored)
    evaluation = evaluate(make(tmp_path, {method: [method] * 12 for method in own}, items=items))
    videos = [item.video for item in items]
    expected = [statistics.compare(own[method], own["vanilla"], videos) for method in ("fmd", "vcd")]
    for method, comparison, p in zip(
        ("fmd", "vcd"), expected, statistics.holm([c.p_value for c in expected]), strict=True
    ):
        cell = evaluation.captions[method]["CIDEr"]
        assert (cell.corpus, cell.comparison, cell.adjusted_p) == (0.25, comparison, p)
        assert cell.mean == statistics.mean(own[method], videos)
    assert evaluation.captions["vanilla"]["CIDEr"].comparison is None
    assert caption_against(evaluation.captions["fmd"]["CIDEr"]).startswith(f"{expected[0].difference.value:+.3f} (")


def test_java_that_is_missing_is_named(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setenv("PATH", "")
    assert "needs Java" in captions.caption_scores(["a"], ["a"])


def test_nothing_to_score_is_told(tmp_path):
    results = Results(tmp_path)
    with pytest.raises(ResultsError, match="no results folder"):
        evaluate(results)
    results.begin({"benchmark": "avhbench"}, [])
    with pytest.raises(ResultsError, match="holds no predictions yet"):
        evaluate(results)
    results = make(tmp_path / "none", {"vanilla": ["Yes", None], "fmd": [None, "Yes"]})
    with pytest.raises(ResultsError, match="has been answered by all of vanilla, fmd yet"):
        evaluate(results)


CHOICES = [Item(f"i{i}", f"v{i}", None, "?", "choice", "B", ("x", "dog", "y", "z"), {"task": "t"}) for i in range(4)]


def official(folder, benchmark, texts, items):
    return (
        evaluate(make(folder, {"vanilla": texts}, benchmark=benchmark, items=items), protocol="official")
        .tables[0]
        .rows[ALL]["vanilla"]
    )


def test_the_official_protocols_read_as_the_scripts_do(tmp_path):
    """With their faults. AVHBench: letters within words; Video-MME: the first capital, unread answers out of the
    denominator; WorldSense: a letter anywhere, and A for nothing."""
    label = Item("i0", "v0", None, "?", "yes-no", "no", (), {"task": "t"})
    items = [dataclasses.replace(label, id=f"i{i}", video=f"v{i}") for i in range(4)]
    cell = official(tmp_path / "a", "avhbench", ["Yes, I know", "I do not know", "yes", "hm"], items)
    assert (cell.accuracy.value, cell.unparsed) == (0.5, 0.25)
    cell = official(tmp_path / "b", "video-mme", ["The best answer is: B", "Best answer: C", "A dog", "none"], CHOICES)
    assert cell.accuracy.num_items == 3 and cell.accuracy.value == pytest.approx(2 / 3) and cell.unparsed == 0.25
    texts = ["It is (A) or (B)", "it is certainly the little dog", "nothing", "B."]
    cell = official(tmp_path / "c", "worldsense", texts, CHOICES)
    assert (cell.accuracy.value, cell.unparsed) == (0.75, 0.0)
    # CMM: the label in the first five characters; Daily-Omni: the first letter, of what follows "assistant".
    cell = official(tmp_path / "d", "cmm", ["I know", "Well, no", " NO.", "yes, no"], items)
    assert (cell.accuracy.value, cell.unparsed) == (0.5, 0.25)
    texts = ["Both of them", "assistant\n b", "The answer is B", "(B)"]
    cell = official(tmp_path / "e", "daily-omni", texts, CHOICES)
    assert (cell.accuracy.value, cell.unparsed) == (0.5, 0.5)
    with pytest.raises(
        ResultsError,
        match="AVQA has no script of its own that reads text.*avhbench, avhbench-deduplicated, video-mme, worldsense, "
        "cmm, daily-omni",
    ):
        official(tmp_path / "f", "avqa", ["B"] * 4, CHOICES)


def test_the_other_reading_is_told_beside(tmp_path):
    """Of the same answers: what each protocol makes of them, and in how many they differ."""
    items = [Item(f"i{i}", f"v{i}", None, "?", "yes-no", "no", (), {"task": "t"}) for i in range(4)]
    results = make(
        tmp_path, {"vanilla": ["I know", "No", "yes", "hm"], "fmd": ["No"] * 4}, benchmark="cmm", items=items
    )
    ours, theirs = evaluate(results), evaluate(results, protocol="official")
    assert [found.accuracy.value for found in ours.reread.values()] == [0.5, 1.0]
    assert [found.accuracy.value for found in theirs.reread.values()] == [0.25, 1.0]
    assert [found.otherwise for found in ours.reread.values()] == [1, 0]
    names = short_names(ours.methods)
    source = "the authors' evaluation/calculate_score.py"
    first, second = reading_lines(ours, names)
    assert first == "reading: ours, as a person reads"
    assert second.startswith(f"beside it official: {source}: vanilla 50.0 (") and "1 answers read otherwise" in second
    assert reading_lines(theirs, names)[0] == f"reading: official: {source}"
    assert evaluate(make(tmp_path / "avqa", {"vanilla": ["B"] * 4}, benchmark="avqa", items=CHOICES)).reread == {}


def test_unread_answers_are_left_out_in_pairs(tmp_path):
    results = make(
        tmp_path, {"vanilla": ["B", "C", "x", "B"], "fmd": ["B", "B", "B", "x"]}, benchmark="video-mme", items=CHOICES
    )
    cells = evaluate(results, protocol="official").tables[0].rows[ALL]
    assert [cells[name].accuracy.num_items for name in cells] == [3, 3]
    assert cells["fmd"].comparison.difference.num_items == 2  # what both have read
    assert (cells["fmd"].comparison.gained, cells["fmd"].comparison.lost) == (1, 0)
    write_scores(results, evaluate(results, protocol="official"))
    assert '"protocol": "official"' in (results.folder / "scores.json").read_text()

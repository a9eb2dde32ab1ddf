"""The report is one file that loads nothing, shows what the scores say, and opens in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import types
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from fmd_ext.lab.eval.benchmarks import load
from fmd_ext.lab.eval.figures import accuracy_figure, difference_figure
from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.predictions import Prediction, Results, Share, write_atomically
from fmd_ext.lab.eval.report import render, write_report
from fmd_ext.lab.eval.scores import ALL, evaluate
from fmd_ext.lab.eval.speed import write_speed
from fmd_ext.lab.eval.statistics import compare, proportion
from fmd_ext.lab.eval.tables import Cell, Table
from fmd_ext.lab.eval.wording import percent, short_names
from fmd_ext.lab.synthetic import write_dataset

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Made-up answers, right more often with "fmd", about clips of which one is deleted again."""
    folder = tmp_path_factory.mktemp("report")
    write_dataset(folder / "data", "test", 6)
    loaded = load("avhbench", folder / "data")
    results = Results(folder / "results")
    results.begin(
        {"benchmark": "avhbench", "model": "made-up <model>", "about": {"random_weights": True}}, loaded.items
    )
    rng = np.random.default_rng(0)
    with Share(results.share_path(0, 1)) as share:
        for method, skill in (("vanilla", 0.5), ("fmd", 0.9)):
            for item in loaded.items:
                wrong = "<script>alert(1)</script>" if item.answer == "yes" else "Yes"
                raw = item.answer if item.kind == "caption" or rng.random() < skill else wrong
                share.append(
                    [Prediction(method, item.id, 0, item.prompt, raw, tokens=2, first_token_s=0.1, seconds=0.2)]
                )
    row = {
        "first_token_s": 0.1,
        "tokens_per_s": 9.0,
        "first_token_ratio": [1, 1.1, 1.2],
        "tokens_per_s_ratio": [1, 1, 1],
    }
    methods = {"vanilla": row | {"peak_bytes": None}, "fmd": row | {"peak_bytes": 2**31}}
    write_speed(results, {"tokens": 32, "items": 3, "prompt_tokens": 99.5, "methods": methods})
    return results


class Page(HTMLParser):
    """What a page loads and shows."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loaded, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]


def test_the_report_says_what_the_scores_say(results, tmp_path):
    evaluation = evaluate(results)
    path = write_report(results, evaluation, tmp_path / "sub/report.html")
    text = path.read_text()
    cell = evaluation.tables[0].rows[ALL]["fmd"]
    assert percent(cell.accuracy) in text and f"p {cell.comparison.p_value:.2g}" in text
    assert "weights are random" in text and "made-up &lt;model&gt;" in text
    for task in evaluation.tables[1].rows:
        assert text.count(task) >= 3  # in the table and in both plots
    gained, lost = (len(evaluation.flips["fmd"][way]) for way in ("gained", "lost"))
    assert f"{gained} gained, {lost} lost" in text and gained > lost
    assert "3 prompts of about 100 tokens" in text and "built-in" not in text
    assert "2.00 GiB" in text and "not measured on a CPU" in text and "1.10 (1.00 to 1.20)" in text


def test_what_became_of_the_questions_is_on_the_page(results, tmp_path):
    shutil.copytree(results.folder, tmp_path / "copy")
    copy, items = Results(tmp_path / "copy"), results.items()
    settings = copy.settings()
    settings["about"]["excluded"] = {"malformed": 3, "missing_videos": 2}
    write_atomically(copy.folder / "run.json", json.dumps(settings))
    copy.record_selection(items[2:], [items[0].id], {"questions": [items[1].id], "kept": False})
    with Share(copy.share_path(1, 2)) as share:
        for number, item in enumerate(items[3:]):
            notes = {"answer cut off": "after 16 tokens"} if number % 2 else {"clip without sound": ""}
            share.append([Prediction("fmd:alpha=0.9", item.id, 0, item.prompt, item.answer, notes=notes)])
        share.append([Prediction("fmd:alpha=0.9", items[2].id, 0, "", None, error="CUDA out of <memory>")])
    evaluation = evaluate(copy)
    text = render(copy, evaluation)
    count = len(items) - 3
    captions = evaluation.counts.captions
    assert f"{count} of {count + 1} questions answered by every method ({captions} of them captions), 1 failed" in text
    left_out = "1 excluded by hand, 1 about videos of the calibration, 3 malformed records, 2 missing videos"
    assert f"left out: {left_out}" in text and "1 answers are missing: CUDA out of &lt;memory&gt;" in text
    rows = re.findall(r'<td class="group">(answer cut off|clip without sound)</td>(.*?)</tr>', text, re.S)
    assert {kind: re.findall(r">(\d+)</td>", row)[-1] for kind, row in rows} == {
        "answer cut off": str(count // 2),
        "clip without sound": str(count - count // 2),
    }
    assert "<title>AVHBench: vanilla, fmd, fmd α0.9</title>" in text and ">fmd:alpha=0.9<" in text  # short, and in full
    assert text.count('data-name="cost">1 prefill, 1 pass per token') == 3


def test_methods_have_short_names_that_differ():
    methods = ["vanilla", "fmd:fork_layers=7:alpha=0.80", "fmd:fork_layers=7:alpha={'visual':0.9,'audio':0.5}"]
    methods += ["vcd:modalities=('visual',)", "vcd:modalities=('audio',)", "drop:needs=audio", "another system"]
    assert list(short_names(methods).values()) == [
        "vanilla",
        "fmd L7 α0.8",
        "fmd L7 α0.9/0.5",
        "vcd",
        "vcd (2)",
        "drop audio",
        "another system",
    ]


@pytest.mark.parametrize("right", [0, 1])
def test_figures_of_groups_of_any_size(right):
    """Of 191 and 287 of the first 999 sizes the report failed, where all or none of a group's answers were right."""
    rows = {}
    for count in [*range(2, 160), 191, 287, 999]:
        accuracy = proportion(np.full(count, right))
        rows[str(count)] = {
            "vanilla": Cell(accuracy, 0.0, {}),
            "fmd": Cell(accuracy, 0.0, {}, compare(np.full(count, right), np.full(count, 1 - right)), 0.5),
            "avcd": Cell(accuracy, 0.0, {}),  # nothing to compare
        }
    evaluation = types.SimpleNamespace(methods=["vanilla", "fmd", "avcd"], baseline="vanilla")
    for figure in (accuracy_figure, difference_figure):
        assert figure(evaluation, Table("size", rows)).startswith("<svg")


def test_nothing_is_loaded_and_nothing_is_run(results):
    text = render(results, evaluate(results))
    page = Page(text)
    assert "script" not in page.tags and "&lt;script&gt;" in text
    assert page.loaded and all(value.startswith("data:") for value in page.loaded)
    assert page.tags.count("img") >= 8 and page.tags.count("svg") >= 4
    # Ids are used within the page by reference: those of two plots must not be the same thing twice.
    figures = re.findall(r"<figure>.*?</figure>", text, re.S)
    assert len(figures) == 2
    clips = [set(re.findall(r'<clipPath id="([^"]+)"', figure)) for figure in figures]
    assert clips[0] and not clips[0] & clips[1]


def test_tables_scroll_by_themselves(results):
    """In a narrow window the page must not become as wide as its widest table."""
    text = render(results, evaluate(results)).split("<h2>Answers that flip</h2>")[0]
    assert text.count("<table") >= 7
    assert "<table" not in re.sub(r'<div class="(?:wide|legend)[^>]*>.*?</div>', "", text, flags=re.S)


def test_a_clip_that_is_gone_is_named(results, tmp_path):
    shutil.copytree(results.folder.parent, tmp_path / "copy")
    moved = Results(tmp_path / "copy/results")
    path = moved.folder / "items.json"
    path.write_text(path.read_text().replace(str(results.folder.parent / "data"), str(tmp_path / "gone")))
    assert "The clip cannot be shown: no such file" in render(moved, evaluate(moved))


def test_one_method_alone(results, tmp_path):
    alone = Results(tmp_path)
    alone.begin(results.settings(), results.items())
    with Share(alone.share_path(0, 1)) as share:
        share.append(p for p in results.predictions().values() if p.method == "fmd")
    text = render(alone, evaluate(alone))
    assert text.count("<figure>") == 1 and "Answers that flip" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1100, 390])
def test_it_opens_in_a_browser(results, tmp_path, width):
    path = write_report(results, evaluate(results), tmp_path / "report.html")
    picture = tmp_path / "report.png"
    said = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},3600",
            f"--screenshot={picture}",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert said.returncode == 0, said.stderr
    assert "CONSOLE" not in said.stderr, said.stderr  # what the page itself complains about
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    # Blue and orange of the two methods, and the warning's yellow, are on it.
    for colour in ((0, 114, 178), (213, 94, 0), (255, 244, 214)):
        assert (np.abs(pixels.astype(int) - colour).max(1) < 8).sum() > 50


SPARSE = {
    "one question": ("video-mme", ["B"], "ours"),
    "nothing parsed": ("avhbench", ["hm"] * 4, "ours"),
    "nothing read": ("video-mme", ["hm"] * 4, "official"),
    "read in turn": ("video-mme", ["B", "hm"] * 2, "official"),
}


@pytest.mark.parametrize("benchmark, said, protocol", SPARSE.values(), ids=SPARSE)
def test_sparse_results_have_a_report(tmp_path, benchmark, said, protocol):
    kind, options, answer = ("choice", ("x", "y"), "B") if benchmark == "video-mme" else ("yes-no", (), "yes")
    categories = {"task": "t", "duration": "d", "domain": "d", "sub-category": "s"}
    items = [Item(f"i{n}", f"v{n}", None, "?", kind, answer, options, categories) for n in range(len(said))]
    results = Results(tmp_path)
    results.begin({"benchmark": benchmark}, items)
    with Share(results.share_path(0, 1)) as share:
        for method, texts in (("vanilla", said), ("fmd", said[::-1])):
            share.append(Prediction(method, item.id, 0, "?", raw) for item, raw in zip(items, texts, strict=True))
    evaluation = evaluate(results, protocol=protocol)
    text = render(results, evaluation)
    unparsed = evaluation.tables[0].rows[ALL]["fmd"].unparsed
    assert unparsed == said.count("hm") / len(said) and f">{100 * unparsed:.1f}</td>" in text
    assert (">reading: official: " in text) == (protocol == "official")
    assert (">reading: ours, " in text) == (protocol == "ours") and ">beside it " in text

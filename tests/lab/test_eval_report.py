"""The report is one file that loads nothing, shows what the scores say, and opens in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from fmd_ext.lab.eval.benchmarks import load
from fmd_ext.lab.eval.predictions import Prediction, Results, Share
from fmd_ext.lab.eval.report import render, write_report
from fmd_ext.lab.eval.scores import ALL, evaluate
from fmd_ext.lab.eval.speed import write_speed
from fmd_ext.lab.eval.wording import percent
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
    assert text.count("<table>") >= 7
    assert "<table>" not in re.sub(r'<div class="wide[^>]*>.*?</div>', "", text, flags=re.S)


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
def test_it_opens_in_a_browser(results, tmp_path):
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
            "--window-size=1100,2400",
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

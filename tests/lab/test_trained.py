"""The model and the clips that come with the package: file to answer, patched and not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration

import fmd_ext
from fmd_ext.config import FMDConfig
from fmd_ext.engine.reference import reference_generate
from fmd_ext.inputs.chat import prepare_inputs
from fmd_ext.inputs.media import load_clip
from fmd_ext.lab.eval.benchmarks import load
from fmd_ext.lab.synthetic import RELATIONS
from fmd_ext.lab.trained import CLIPS, MODEL, SETTINGS, bundled_scenes
from paths import ROOT

SIX_LAYERS = 6


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def trained():
    return Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(MODEL).eval()


@pytest.fixture(scope="module")
def clips():
    return {path: load_clip(path) for path in bundled_scenes()}


def test_it_is_small_and_whole(trained):
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    assert trained.num_parameters() < 5e6 and trained.dtype == torch.float32
    assert trained.config.get_text_config().num_hidden_layers == SIX_LAYERS
    FMDConfig.from_file(SETTINGS).resolve(FMDConfig(), SIX_LAYERS)


def test_its_card_says_what_the_evidence_says():
    """Its figures are lines of docs/evidence.md."""
    card, evidence = (MODEL / "README.md").read_text(), (ROOT / "docs" / "evidence.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and [row for row in rows if row not in evidence.splitlines()] == []
    assert "1.4 M parameters" in card and "1.4 M parameters" in evidence and "license: apache-2.0" in card
    assert "20 have a picture only, 3 a sound only and 8 both" in " ".join(card.split())
    assert "20 have a picture only, 3 a sound only and 8 both" in evidence


def test_the_clips_are_of_all_relations_and_small(clips):
    assert {scene.relation for scene in bundled_scenes().values()} == set(RELATIONS)
    assert all(path.stat().st_size < 60_000 for path in clips) and len(clips) >= 10
    for name in ("avhbench", "music-avqa", "avqa"):
        loaded = load(name, CLIPS)
        assert loaded.malformed == [] and loaded.missing == [] and loaded.items


@pytest.mark.parametrize(
    "settings",
    [
        {"masking": "zero", "fork_layers": 2, "alpha": 0.8},
        {"masking": "zero", "fork_layers": 4, "alpha": 0.6, "mask_scale": 0.3},
        {"masking": "attention", "fork_layers": 3},
        {"masking": "attention", "fork_layers": 6},
    ],
    ids=str,
)
def test_patched_answers_are_the_reference_s(trained, processor, clips, settings):
    """From the file to the words of a caption, 16 tokens each: every one is decided by the merged states."""
    config = FMDConfig(**settings).resolve(FMDConfig(), SIX_LAYERS)
    for path in list(clips)[3:6]:
        inputs = prepare_inputs(processor, clips[path], "Describe what you see and hear.")
        expected = reference_generate(trained, config, 16, **inputs)
        with fmd_ext.patch(trained, config):
            got = trained.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert got.shape[1] > 3
        assert torch.equal(got, expected[:, : got.shape[1]])


def accuracy(trained, processor, clips, relations):
    """0 or 1 for each yes/no question about what is visible and what sounds in bundled clips, float [items]."""
    right = []
    for item in load("avhbench", CLIPS, prompt="plain").items:
        scene = bundled_scenes()[item.path]
        if item.kind != "yes-no" or scene.relation not in relations or item.categories["task"] == "AV Matching":
            continue
        inputs = prepare_inputs(processor, clips[item.path], item.prompt)
        answer = trained.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1:]
        right.append(processor.tokenizer.decode(answer) == item.answer)
    return np.array(right, float)


def test_it_sees_and_hears_where_nothing_misleads(trained, processor, clips):
    right = accuracy(trained, processor, clips, ("matched",))
    assert len(right) >= 20 and right.mean() > 0.9

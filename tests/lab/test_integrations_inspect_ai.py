"""Model and task for inspect_ai: an evaluation of ours run by it gives what our own run gives."""

from __future__ import annotations

import pytest

from eval_data import records, write_benchmark, write_json
from fmd_ext.inputs.media import load_clip
from fmd_ext.lab.eval.benchmarks import load
from fmd_ext.lab.eval.clips import Reading
from fmd_ext.lab.eval.generation import Decoding
from fmd_ext.lab.eval.methods import parse_methods
from fmd_ext.lab.eval.predictions import Results
from fmd_ext.lab.eval.run import Runner
from fmd_ext.lab.tiny import save_random_model

inspect_ai = pytest.importorskip("inspect_ai", reason="inspect_ai is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect_ai")
    write_benchmark(folder / "data", "avhbench")
    save_random_model(folder / "model", seed=1)
    return folder


@pytest.fixture
def registry(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INSPECT_LOG_DIR", str(tmp_path / "logs"))
    import fmd_ext.lab.inspect_ai.registry as registry

    return registry


def run(registry, folder, **more):
    from inspect_ai.model import get_model

    model = get_model(f"fmd_ext/{folder / 'model'}", method="fmd-zero:fork_layers=2", max_frames=4)
    task = registry.benchmark("avhbench", str(folder / "data"))
    (log,) = inspect_ai.eval(task, model=model, display="none", max_tokens=4, **more)
    return log


def test_an_evaluation_by_inspect_ai_gives_our_answers(registry, folder, tmp_path):
    from fmd_ext.cli.models import load_model

    log = run(registry, folder)
    assert log.status == "success", log.error
    loaded = load("avhbench", folder / "data")
    items = [item for item in loaded.items if item.kind != "caption"]
    model = load_model(str(folder / "model"))
    results = Results(tmp_path / "results")
    results.begin({}, loaded.items)
    Runner(
        model.model,
        model.processor,
        parse_methods("fmd-zero:fork_layers=2"),
        results,
        limits=loaded.benchmark.max_new_tokens,
        decoding=Decoding(max_new_tokens=4),
        reading=Reading(max_frames=4),
    ).run(items, progress=False)
    ours = {p.item: p for p in results.predictions().values()}
    assert {sample.id: sample.output.completion for sample in log.samples} == {name: p.raw for name, p in ours.items()}
    scores = {sample.id: sample.scores["as_a_person_reads"] for sample in log.samples}
    assert {name: score.answer for name, score in scores.items()} == {name: p.parsed for name, p in ours.items()}
    assert {sample.output.usage.output_tokens for sample in log.samples} <= {1, 2, 3, 4}
    metrics = log.results.scores[0].metrics
    assert {"accuracy", "stderr", "AV Matching"} <= set(metrics)
    assert metrics["accuracy"].value == pytest.approx(sum(p.score for p in ours.values()) / len(ours))


def test_a_clip_that_cannot_be_read_fails_alone(registry, folder, tmp_path):
    """inspect_ai's own policy: the run goes on, the sample has its error."""
    write_benchmark(tmp_path / "data", "avhbench")
    (tmp_path / "data/video/00002.mp4").write_bytes(b"no clip")
    (tmp_path / "model").symlink_to(folder / "model")
    log = run(registry, tmp_path, fail_on_error=False)
    failed = [sample.id for sample in log.samples if sample.error]
    assert failed == ["00002/Audio-driven Video Hallucination/1"] and len(log.samples) == 6


def test_a_question_gets_just_the_senses_that_it_is_asked_with(registry, tmp_path):
    from inspect_ai.model import ContentAudio, ContentVideo

    write_benchmark(tmp_path / "data", "cmm")
    with pytest.raises(ValueError, match="-T clips=FOLDER says where copies"):
        registry.benchmark("cmm", str(tmp_path / "data"))
    task = registry.benchmark("cmm", str(tmp_path / "data"), clips=str(tmp_path / "clips"))
    media = [sample.input[0].content[0] for sample in task.dataset]
    assert [type(medium) for medium in media] == [ContentVideo, ContentAudio, ContentVideo]
    given = [load_clip(getattr(medium, "video", None) or medium.audio) for medium in media]
    assert [clip.missing for clip in given] == ["audio", "video", None]


def test_what_cannot_be_asked_is_an_error(registry, folder, tmp_path):
    write_benchmark(tmp_path, "avqa")
    with pytest.raises(ValueError, match="1 records are not as published, the first: record 3 lacks multi_choice"):
        registry.benchmark("avqa", str(tmp_path))
    write_json(tmp_path / "val_qa.json", records("avqa")[:2])
    assert len(registry.benchmark("avqa", str(tmp_path)).dataset) == 2
    for video in (tmp_path / "videos").iterdir():
        video.unlink()
    with pytest.raises(ValueError, match="has a video and a score"):
        registry.benchmark("avqa", str(tmp_path))

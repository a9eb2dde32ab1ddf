"""Runs: resumed and shared ones give what an unbroken one gives, and answers are the model's own."""

from __future__ import annotations

import dataclasses
import multiprocessing
import random
import signal
import time

import pytest
import torch

import fmd_ext
from eval_data import write_benchmark
from eval_model import READING, readable, runner
from fmd_ext.inputs.chat import prepare_inputs
from fmd_ext.inputs.media import load_clip
from fmd_ext.lab.eval.benchmarks import load
from fmd_ext.lab.eval.generation import Decoding
from fmd_ext.lab.eval.predictions import Locked, Results, Share
from fmd_ext.lab.eval.run import make_batches, rank_and_size
from fmd_ext.lab.tiny import tiny_processor, write_clip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """AVHBench with three clips of unequal length, one of them without sound."""
    folder = write_benchmark(tmp_path_factory.mktemp("run"), "avhbench")
    write_clip(folder / "video/00002.mp4", seconds=2.0, width=64, height=56, seed=5, sound=False)
    return folder


@pytest.fixture(scope="module")
def loaded(data):
    return load("avhbench", data)


@pytest.fixture
def model(thinker):
    suppressed = thinker.generation_config.suppress_tokens
    yield readable(thinker)
    thinker.generation_config.suppress_tokens = suppressed


def said(results):
    """All that a run decides: not the times."""
    times = {"first_token_s": 0, "seconds": 0}
    return {key: dataclasses.replace(p, **times) for key, p in sorted(results.predictions().items())}


@pytest.fixture
def unbroken(model, loaded, tmp_path):
    results = Results(tmp_path / "unbroken")
    runner(model, loaded, results).run(loaded.items, batch_size=2, progress=False)
    return said(results)


def test_answers_are_those_of_generate(model, loaded, tmp_path):
    results = Results(tmp_path)
    runner(model, loaded, results).run(loaded.items, progress=False)
    predictions = results.predictions()
    assert len(predictions) == 3 * len(loaded.items)
    processor = tiny_processor()
    for item in loaded.items[:2]:
        clip = load_clip(item.path, fps=READING.fps, max_frames=READING.max_frames)
        inputs = prepare_inputs(processor, clip, item.prompt, frame_pixels=READING.frame_pixels)
        for method, config in (("vanilla", None), ("fmd-zero:fork_layers=2", {"masking": "zero", "fork_layers": 2})):
            if config:
                fmd_ext.patch(model, **config)
            ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
            if config:
                fmd_ext.unpatch(model)
            text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            prediction = predictions[method, item.id, 0]
            assert (prediction.raw, prediction.prompt) == (text, item.prompt)
            assert prediction.tokens == 3 and prediction.seconds > prediction.first_token_s > 0
    assert {p.score for p in predictions.values() if p.item.startswith("00002/AV Cap")} == {None}


def test_batches_are_of_a_length_and_keep_a_video_together(loaded):
    batches = make_batches(loaded.items, 2)
    assert sorted(item.id for batch in batches for item in batch) == sorted(item.id for item in loaded.items)
    assert [item.video for item in batches[0]][0] == "00002"  # the longest first
    assert [item.kind for item in batches[-1]] == ["caption"]  # long answers apart
    assert make_batches(loaded.items, 1) == [[item] for item in loaded.items]


def test_batched_answers_are_those_of_single_questions(model, loaded, tmp_path, unbroken):
    results = Results(tmp_path / "single")
    runner(model, loaded, results).run(loaded.items, batch_size=1, progress=False)
    single = said(results)
    assert {key: p.raw for key, p in single.items()} == {key: p.raw for key, p in unbroken.items()}
    assert {p.batch for p in unbroken.values()} == {1, 2}  # the soundless clip is asked about apart


def test_resuming_does_what_is_missing_and_nothing_else(model, loaded, tmp_path, unbroken):
    results = Results(tmp_path / "results")
    runner(model, loaded, results).run(loaded.items[:3], batch_size=2, progress=False)
    path = results.share_path(0, 1)
    before = path.read_bytes()
    runner(model, loaded, results).run(loaded.items[:3], batch_size=2, progress=False)
    assert path.read_bytes() == before
    path.write_bytes(before[: len(before) // 2])  # within a line
    runner(model, loaded, results).run(loaded.items, batch_size=2, progress=False)
    assert said(results) == unbroken
    assert len(path.read_text().splitlines()) == len(unbroken)


def start(model, loaded, results, rank=0, size=1):
    """The same run in a process of its own, forked: loading everything anew would take seconds."""
    process = multiprocessing.get_context("fork").Process(target=work, args=(model, loaded, results, rank, size))
    process.start()
    return process


def work(model, loaded, results, rank, size):
    torch.set_grad_enabled(False)
    runner(model, loaded, results).run(loaded.items, batch_size=2, rank=rank, size=size, progress=False)


def lines(results):
    return sum(len(path.read_text().splitlines()) for path in results.folder.glob("shares/*"))


def wait_for(results, count):
    """Until so many predictions are on the disk, or a few more."""
    deadline = time.monotonic() + 60
    while lines(results) < count and time.monotonic() < deadline:
        time.sleep(0.001)


def test_killed_at_random_points_and_resumed(model, loaded, tmp_path, unbroken):
    results = Results(tmp_path / "results")
    draw = random.Random(0)
    for count in (2, 7, 13):
        process = start(model, loaded, results)
        wait_for(results, count)
        time.sleep(draw.uniform(0, 0.03))  # anywhere in the next batch
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    work(model, loaded, results, 0, 1)
    assert said(results) == unbroken
    assert lines(results) == len(unbroken)


def test_two_processes_do_what_one_does(model, loaded, tmp_path, unbroken):
    results = Results(tmp_path / "results")
    processes = [start(model, loaded, results, rank, 2) for rank in range(2)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
        assert lines(results) == len(unbroken)  # whichever returns, all is answered: it may be scored
    assert said(results) == unbroken
    assert lines(results) == len(unbroken)


def test_the_share_of_a_killed_process_is_taken_over(model, loaded, tmp_path, unbroken):
    """And another number of processes afterwards finds nothing to do."""
    results = Results(tmp_path / "results")
    process = start(model, loaded, results, 1, 2)
    wait_for(results, 1)
    process.kill()
    process.join()
    assert results.share_path(1, 2).exists()
    work(model, loaded, results, 0, 2)
    assert said(results) == unbroken
    work(model, loaded, results, 1, 3)
    assert lines(results) == len(unbroken)


def test_two_runs_at_once_are_refused(model, loaded, tmp_path):
    results = Results(tmp_path)
    with Share(results.share_path(0, 1)), pytest.raises(Locked, match="another process is at work"):
        runner(model, loaded, results).run(loaded.items, progress=False)
    with Share(results.share_path(1, 2)), pytest.raises(Locked, match="another run"):
        runner(model, loaded, results).run(loaded.items, progress=False)


def test_clips_of_unequal_frame_rate_are_asked_about_apart(model, loaded, tmp_path):
    """A long clip is sampled at a lower rate, and one call takes one rate."""
    long = write_clip(tmp_path / "long.mp4", seconds=4.0, width=64, height=56)
    items = [loaded.items[0], dataclasses.replace(loaded.items[1], path=long)]
    results = Results(tmp_path / "results")
    runner(model, loaded, results, methods="vanilla").run(items, batch_size=2, progress=False)
    assert [(p.error, p.batch) for p in results.predictions().values()] == [(None, 1)] * 2


def test_a_prompt_beyond_the_models_context_is_an_error(model, loaded, tmp_path):
    short = runner(model, loaded, Results(tmp_path), methods="vanilla")
    short.context_limit = 30
    short.run(loaded.items[:1], progress=False)
    (prediction,) = short.results.predictions().values()
    assert "exceed the model's limit of 30" in prediction.error


def test_sampling_repeats_with_its_seed(model, loaded, tmp_path):
    def sampled(folder, seed):
        results = Results(tmp_path / folder)
        decoding = Decoding(temperature=1.0, samples=3, seed=seed, max_new_tokens=4)
        runner(model, loaded, results, methods="vanilla,fmd", decoding=decoding).run(loaded.items[:2], progress=False)
        return {key: p.raw for key, p in results.predictions().items()}

    first = sampled("first", 0)
    assert first == sampled("again", 0) and first != sampled("other", 1)
    item = loaded.items[0].id
    assert len({first["vanilla", item, sample] for sample in range(3)}) > 1


def test_the_random_numbers_are_the_same_for_all_methods(model, loaded, tmp_path):
    """Two names of one method give the same samples: what differs between methods is the method."""
    results = Results(tmp_path)
    decoding = Decoding(temperature=1.0, samples=2, max_new_tokens=4)
    methods = ("fmd-zero:fork_layers=2", "fmd:masking=zero:fork_layers=2")
    runner(model, loaded, results, methods=",".join(methods), decoding=decoding).run(loaded.items[:2], progress=False)
    said = [[p.raw for p in results.predictions().values() if p.method == method] for method in methods]
    assert said[0] == said[1] and len(said[0]) == 4


def test_rank_and_size(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert rank_and_size() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ValueError, match="0 <= RANK < WORLD_SIZE, got 2 and 1"):
        rank_and_size()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ValueError, match="whole numbers"):
        rank_and_size()


WRONG = [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"samples": 2}, {"samples": 0}]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_decoding_is_refused(wrong):
    with pytest.raises(ValueError):
        Decoding(**wrong)

"""A run survives its items: what cannot be read, prepared or answered is recorded with its reason."""

from __future__ import annotations

import dataclasses
import logging
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest
import torch

from eval_data import write_benchmark
from eval_model import READING, readable, runner
from fmd_ext.lab.eval import clips, run
from fmd_ext.lab.eval.benchmarks import load
from fmd_ext.lab.eval.clips import ClipInputs
from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.predictions import Results
from fmd_ext.lab.eval.run import DeviceLost
from fmd_ext.lab.tiny import tiny_processor, write_clip

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of ..."


def write_odd_clip(path, width, height, samples, frames=10):
    """A picture of any form, and so many samples of silence at 16 kHz."""
    with av.open(str(path), "w", format="matroska") as out:
        video = out.add_stream("mpeg4", rate=5)
        video.width, video.height = width, height
        audio = out.add_stream("pcm_s16le", rate=16000, layout="mono")
        for _ in range(frames):
            picture = av.VideoFrame.from_ndarray(np.zeros((height, width, 3), np.uint8), format="rgb24")
            out.mux(video.encode(picture))
        out.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, samples), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16000
        out.mux(audio.encode(frame))
        out.mux(audio.encode(None))
    return path


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load("avhbench", write_benchmark(tmp_path_factory.mktemp("failures"), "avhbench"))


@pytest.fixture
def model(thinker):
    suppressed = thinker.generation_config.suppress_tokens
    yield readable(thinker)
    thinker.generation_config.suppress_tokens = suppressed


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "results")


def errors(results):
    return {key[1]: p.error for key, p in results.predictions().items()}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_odd_clip_is_an_error_of_its_own(model, loaded, results, tmp_path, batch_size):
    (tmp_path / "broken.mp4").write_bytes(b"no clip")
    paths = {
        "sound": write_odd_clip(tmp_path / "sound.mkv", 64, 56, 192),
        "picture": write_odd_clip(tmp_path / "picture.mkv", 3000, 12, 16000),
        "broken": tmp_path / "broken.mp4",
        "missing": None,
    }
    odd = [dataclasses.replace(loaded.items[0], id=name, path=path) for name, path in paths.items()]
    items = [*odd, *loaded.items[:3]]
    asking = runner(model, loaded, results, methods="vanilla")
    asking.run(items, batch_size=batch_size, progress=False)
    found = errors(results)
    assert len(found) == 7 and [found[item.id] for item in loaded.items[:3]] == [None] * 3
    assert "aspect ratio" in found["picture"] and "no media file" in found["broken"]
    assert found["missing"] == "the video is missing" and found["sound"] is None  # padded with silence

    before = results.share_path(0, 1).read_bytes()
    asking.run(items, batch_size=batch_size, progress=False)
    assert results.share_path(0, 1).read_bytes() == before  # what failed is not asked again
    write_clip(paths["broken"], seconds=1.0, width=64, height=56)  # mended
    asking = runner(model, loaded, results, methods="vanilla")
    asking.run(items, batch_size=batch_size, progress=False, retry_failed=True)
    assert errors(results)["broken"] is None and errors(results)["missing"]


class Flaky:
    """`answer`, which raises an error at some calls, by what they ask."""

    def __init__(self, monkeypatch, error, fails):
        self.error, self.fails, self.batches, self.real = error, fails, [], run.answer
        monkeypatch.setattr(run, "answer", self)

    def __call__(self, *args, random_key, **more):
        self.batches.append(random_key[1:])
        if self.fails(self.batches):
            raise self.error
        return self.real(*args, random_key=random_key, **more)


def test_a_question_that_runs_out_of_memory_is_tried_once_more(model, loaded, results, monkeypatch):
    items = loaded.items[:3]
    flaky = Flaky(monkeypatch, torch.OutOfMemoryError(OUT_OF_MEMORY), lambda asked: len(asked) == 2)
    runner(model, loaded, results, methods="vanilla").run(items, progress=False)
    assert [batch[0] for batch in flaky.batches] == [items[0].id, items[1].id, items[1].id, items[2].id]
    assert set(errors(results).values()) == {None}


def test_a_question_that_never_fits_fails_alone(model, loaded, results, monkeypatch):
    """In a batch: the others are asked one by one and answer."""
    items = loaded.items[:3]
    flaky = Flaky(
        monkeypatch, RuntimeError("DefaultCPUAllocator: can't allocate memory"), lambda asked: items[1].id in asked[-1]
    )
    runner(model, loaded, results, methods="vanilla").run(items, batch_size=3, progress=False)
    assert [len(batch) for batch in flaky.batches] == [3, 1, 1, 1, 1]
    found = errors(results)
    assert found.pop(items[1].id) == "RuntimeError: DefaultCPUAllocator: can't allocate memory"
    assert set(found.values()) == {None} and {p.batch for p in results.predictions().values()} == {1}


def test_any_other_error_is_recorded_at_once(model, loaded, results, monkeypatch):
    items = loaded.items[:2]
    flaky = Flaky(monkeypatch, IndexError("index 7 is out of bounds\nmore"), lambda asked: len(asked) == 1)
    runner(model, loaded, results, methods="vanilla").run(items, progress=False)
    assert len(flaky.batches) == 2
    assert errors(results) == {items[0].id: "IndexError: index 7 is out of bounds", items[1].id: None}


def test_a_lost_device_ends_the_run_behind_its_question(model, loaded, results, monkeypatch):
    """Every further call of the process would fail: they are not recorded as failures."""
    items = loaded.items[:3]
    Flaky(
        monkeypatch, torch.AcceleratorError("CUDA error: device-side assert triggered"), lambda asked: len(asked) == 2
    )
    with pytest.raises(DeviceLost, match="device-side assert"):
        runner(model, loaded, results, methods="vanilla").run(items, progress=False)
    assert len(errors(results)) == 2
    runner(model, loaded, results, methods="vanilla").run(items, progress=False)
    assert [error is None for error in errors(results).values()] == [True, False, True]


def test_an_interrupted_run_is_no_failure(model, loaded, results, monkeypatch):
    Flaky(monkeypatch, KeyboardInterrupt(), lambda asked: len(asked) == 2)
    with pytest.raises(KeyboardInterrupt):
        runner(model, loaded, results, methods="vanilla").run(loaded.items[:3], progress=False)
    assert list(errors(results).values()) == [None]


def test_a_clip_whose_length_cannot_be_read_ends_no_run(model, loaded, results, monkeypatch):
    """Batches are made by length, before the first question."""

    def seconds(path):
        raise IndexError("a damaged index")

    monkeypatch.setattr(run, "clip_seconds", seconds)
    runner(model, loaded, results, methods="vanilla").run(loaded.items[:2], batch_size=2, progress=False)
    assert set(errors(results).values()) == {None} and len(errors(results)) == 2


def item(path):
    return Item("a", "v", path, "Is it?", "yes-no", "yes", prompt="Is it?")


def test_notes_say_what_the_model_did_not_get(tmp_path):
    long = write_clip(tmp_path / "long.mp4", seconds=4.0, width=64, height=56)
    mute = write_clip(tmp_path / "mute.mp4", seconds=1.0, width=64, height=56, sound=False)
    processor = tiny_processor()
    processor.feature_extractor.n_samples = 2 * processor.feature_extractor.sampling_rate
    inputs = ClipInputs(processor, READING)  # 2 frames per second, 4 frames at most
    cut, soundless = inputs.prepare([item(long)])[0], inputs.prepare([item(mute)])[0]
    assert cut.notes[0][clips.LOWERED] == "1 instead of 2 frames per second"
    assert cut.notes[0][clips.SOUND_CUT] == "2 s of 4.0 s" and clips.OTHER not in cut.notes[0]
    assert cut.shown[0] == {"frames": 4, "picture_s": 4.0, "sound_s": 2.0}
    assert soundless.notes == ({clips.NO_SOUND: ""},)
    assert soundless.shown[0] == {"frames": 2, "picture_s": 1.0, "sound_s": 0.0}


@pytest.mark.parametrize("name", ["load_clip_for", "prepare_batch"])
@pytest.mark.parametrize("times", [1, 2])
def test_reading_and_preparing_are_tried_once_more_without_memory(tmp_path, monkeypatch, name, times):
    path = write_clip(tmp_path / "clip.mp4", seconds=1.0, width=64, height=56)
    real, calls = getattr(clips, name), iter(range(100))

    def full(*args, **more):
        if next(calls) < times:
            raise MemoryError("no room")
        return real(*args, **more)

    monkeypatch.setattr(clips, name, full)
    (group,) = ClipInputs(tiny_processor(), READING).prepare([item(path)])
    assert group.error == (None if times == 1 else "MemoryError: no room")


def test_two_threads_can_read(tmp_path):
    """One reads ahead while the other asks the questions of a failed batch alone."""
    paths = [write_clip(tmp_path / f"{n}.mp4", seconds=0.5, width=32, height=32, seed=n) for n in range(12)]
    inputs = ClipInputs(tiny_processor(), READING)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda path: inputs.read([item(path)])[0], [*paths, *paths[::-1]] * 2))
    assert all(shown.clip.path in paths for shown in found)


def test_what_is_logged_about_a_clip_is_noted(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", seconds=1.0, width=64, height=56)
    real = clips.load_clip_for

    def damaged(processor, path, **more):
        logging.getLogger("fmd_ext.inputs.media").warning("%s is damaged: %d packets were left out", path, 3)
        return real(processor, path, **more)

    monkeypatch.setattr(clips, "load_clip_for", damaged)
    (group,) = ClipInputs(tiny_processor(), READING).prepare([item(path)])
    assert group.notes == ({clips.DAMAGED: "is damaged: 3 packets were left out"},)


def test_notes_are_kept_with_the_predictions(model, loaded, results):
    runner(model, loaded, results, methods="vanilla").run(loaded.items[:1], progress=False)
    (prediction,) = results.predictions().values()
    assert prediction.tokens == 3 and prediction.notes == {clips.CUT_OFF: "after 3 tokens"}
    assert prediction.shown["frames"] == 2 and prediction.shown["sound_s"] == pytest.approx(1.0, abs=0.1)

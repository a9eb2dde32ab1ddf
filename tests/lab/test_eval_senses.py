"""Benchmarks that say which sense is given: CMM and Daily-Omni; and AVHBench with each question once."""

from __future__ import annotations

import collections
import dataclasses

import av
import numpy as np
import pytest

from eval_data import FILES, records, write_benchmark, write_json
from fmd_ext.inputs.media import load_clip
from fmd_ext.lab.eval.benchmarks import BENCHMARKS, load
from fmd_ext.lab.eval.clips import ClipInputs, Reading, clip_of
from fmd_ext.lab.eval.exports import OFFICIAL
from fmd_ext.lab.eval.predictions import _item, _written
from fmd_ext.lab.eval.whole_files import whole_file
from fmd_ext.lab.tiny import tiny_processor

NAMES = ("cmm", "daily-omni", "daily-omni-picture", "daily-omni-sound")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("senses")
    return {name: write_benchmark(root / name, name) for name in NAMES}


def shown(items):
    """(frames, seconds of sound) of what the model is given."""
    read = ClipInputs(tiny_processor(), Reading()).read(items)
    assert not [clip for clip in read if isinstance(clip, str)], read
    return [(clip.seconds["frames"] > 0, clip.seconds["sound_s"] > 0) for clip in read]


def test_cmm(folders):
    """What a record does not name is not given, though the video file has a sound of its own."""
    loaded = load("cmm", folders["cmm"])
    assert [item.senses for item in loaded.items] == ["picture", "sound", "both"] and not loaded.missing
    assert [item.answer for item in loaded.items] == ["yes", "no", "no"]
    assert [item.categories["measure"] for item in loaded.items] == [
        "perception accuracy",
        "hallucination resistance",
        "hallucination resistance",
    ]
    assert loaded.items[2].categories["sub-category measure"] == "visual-audio-language, hallucination resistance"
    assert loaded.items[0].prompt == "Did you see a dog in the video? Answer with yes or no."
    assert loaded.items[1].path.suffix == ".wav" and loaded.items[2].sound.name == "c_sound.wav"
    assert shown(loaded.items) == [(True, False), (False, True), (True, True)]


def test_the_sound_is_that_of_its_own_file(folders):
    item = load("cmm", folders["cmm"]).items[2]
    inputs = ClipInputs(tiny_processor(), Reading())
    clip = inputs.read([item])[0].clip
    expected = 0.1 * np.random.default_rng(3).standard_normal(16000)
    assert np.corrcoef(clip.audio[:16000], expected[: clip.audio.size])[0, 1] > 0.99


@pytest.mark.parametrize("name, given", [("daily-omni", (True, True)), ("daily-omni-picture", (True, False)),
                                         ("daily-omni-sound", (False, True))])  # fmt: skip
def test_daily_omni_has_three_modes(folders, name, given):
    loaded = load(name, folders[name])
    assert [item.id for item in loaded.items] == ["x1/1", "x1/2"] and [item.answer for item in loaded.items] == [
        "B",
        "A",
    ]
    assert loaded.items[0].options == ("A horn", "A bell", "A voice", "Nothing")
    assert loaded.items[1].categories == {
        "type": "Reasoning",
        "duration": "60s",
        "category": "Autos & Vehicles",
        "topic": "unknown",
    }
    assert shown(loaded.items) == [given, given]


@pytest.mark.parametrize("name", NAMES)
def test_items_come_back_from_a_record(folders, name):
    items = load(name, folders[name]).items
    assert [_item(_written(item)) for item in items] == items
    old = {key: value for key, value in _written(items[0]).items() if key not in ("sound", "senses")}
    assert _item(old).senses == "both" and _item(old).sound is None


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("cmm", {"answer": "perhaps"}, "record 1 has the answer 'perhaps', not yes or no"),
        ("cmm", {"video_path": "None"}, "record 1 names neither a video_path nor an audio_path"),
        ("daily-omni", {"Answer": "E"}, "record 1: Answer 'E' is no letter of the choices"),
    ],
)
def test_wrong_records_are_listed(tmp_path, name, change, message):
    write_json(tmp_path / FILES[name], [{**records(name)[0], **change}, *records(name)])
    loaded = load(name, tmp_path)
    assert [line for line in loaded.malformed if message in line] and len(loaded.items) == len(records(name))
    assert loaded.missing


def test_a_video_without_the_sense_that_is_asked_about_is_told(tmp_path):
    write_benchmark(tmp_path, "daily-omni")
    (tmp_path / "Videos/x1/x1_video.mp4").write_bytes((tmp_path / "Videos/x1/x1_audio.wav").read_bytes())
    (said, _) = ClipInputs(tiny_processor(), Reading()).read(load("daily-omni-picture", tmp_path).items)
    assert "has no picture, and the question is about it alone" in said


def test_a_video_is_never_asked_about_with_another_sound(tmp_path):
    """CMM puts another sound beside a video: without that file there is nothing to ask."""
    write_benchmark(tmp_path, "cmm")
    (tmp_path / "visual-audio/c_sound.wav").unlink()
    loaded = load("cmm", tmp_path)
    assert [item.path for item in loaded.items if item.senses == "both"] == [None] and loaded.missing


@pytest.mark.parametrize("name, given", [("daily-omni", (True, True)), ("daily-omni-sound", (False, True))])
def test_without_a_sound_file_daily_omni_takes_the_videos_own(tmp_path, name, given):
    write_benchmark(tmp_path, name)
    (tmp_path / "Videos/x1/x1_audio.wav").unlink()
    loaded = load(name, tmp_path)
    assert not loaded.missing and all(item.path.name == "x1_video.mp4" and item.sound is None for item in loaded.items)
    assert shown(loaded.items) == [given, given]


def test_two_questions_about_one_sample_are_one_cluster(tmp_path):
    """They follow each other and agree in all categories; their files are named apart. A third one is of the next."""
    row = records("cmm")[0]
    rows = [dict(row, video_path=f"./visual-language/{name}.mp4", answer=answer)
            for name, answer in (("p", "yes"), ("q", "no"), ("r", "yes"))]  # fmt: skip
    rows += [dict(row, granularity="event-level", video_path="./visual-language/s.mp4")]
    write_json(tmp_path / FILES["cmm"], rows)
    items = load("cmm", tmp_path).items
    assert [item.video[-5:] for item in items] == ["p.mp4", "p.mp4", "r.mp4", "s.mp4"]
    assert [row["video_path"][-5:] for row in OFFICIAL["cmm"]([(item, "") for item in items])] == [
        "p.mp4", "q.mp4", "r.mp4", "s.mp4"
    ]  # fmt: skip


def test_the_reports_examples_show_what_the_model_was_given(folders):
    (first, _, third) = load("cmm", folders["cmm"]).items
    assert clip_of(first, load_clip).audio is None
    assert clip_of(third, load_clip).audio.size == load_clip(third.sound).audio.size


def test_daily_omni_has_its_published_counts(tmp_path):
    types, durations = (
        [value for value, count in BENCHMARKS["daily-omni"].published_groups[name].items() for _ in range(count)]
        for name in ("type", "duration")
    )
    rows = [
        dict(records("daily-omni")[0], Type=kind, video_duration=duration)
        for kind, duration in zip(types, durations, strict=True)
    ]
    write_json(tmp_path / "qa.json", rows)
    assert load("daily-omni", tmp_path).count_report() == ["as many questions as published (qa.json)"]


@pytest.mark.parametrize("name, given", [("daily-omni", "video"), ("daily-omni-sound", "audio")])
def test_daily_omni_is_asked_as_its_authors_ask(folders, name, given):
    lines = load(name, folders[name]).items[0].prompt.splitlines()
    assert len(lines) == 5 and lines[0].endswith(f"based on the given {given}.")
    assert lines[2] == "Question: Which sound follows the red car?"
    assert lines[3] == "Choices: " + str(records("daily-omni")[0]["Choice"])  # as Python writes the published list


def test_avhbench_may_ask_each_question_once(tmp_path):
    """A pair with one label is asked once, one with both labels not at all; captions stay."""
    rows = records("avhbench")
    rows += [rows[0], dict(rows[5], label="Yes"), rows[6]]
    write_json(tmp_path / FILES["avhbench"], rows)
    whole, once = load("avhbench", tmp_path).items, load("avhbench-deduplicated", tmp_path).items
    assert len(whole) == 10 and len(once) == 7
    asked = collections.Counter((item.video, item.question) for item in once if item.kind == "yes-no")
    assert set(asked.values()) == {1} and ("00002", "Is the car visible in the video?") not in asked
    assert sum(item.kind == "caption" for item in once) == 2
    assert [item.id for item in once] == [item.id for item in whole if item in once]  # the ids of the whole file


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_file_holds_just_what_is_given(folders, tmp_path, name):
    """The same frames and samples, for harnesses that hand on files; a file that holds just that is not copied."""
    for item in load(name, folders[name]).items:
        path = whole_file(item, tmp_path / "clips")
        expected, found = clip_of(item, load_clip), load_clip(path)
        assert found.missing == expected.missing
        assert item.senses == "sound" or np.array_equal(found.frames, expected.frames)
        assert item.senses == "picture" or np.array_equal(found.audio, expected.audio)
        assert (path == item.path) == (item.senses == "sound")
        assert whole_file(item, tmp_path / "clips") == path
        silent = dataclasses.replace(item, path=path, sound=None)
        assert whole_file(silent, tmp_path / "again") == path and not (tmp_path / "again").exists()
        broken = dataclasses.replace(item, path=tmp_path / "broken.mp4", sound=None, senses="picture")
        broken.path.write_bytes(b"no clip")
        with pytest.raises(ValueError, match=r"broken\.mp4 cannot be copied without what is not asked about: "):
            whole_file(broken, tmp_path)


def test_the_sound_of_a_copy_begins_with_the_picture(tmp_path):
    """Also where the picture begins late: elsewhere the sound would be cut, or be late itself."""
    write_benchmark(tmp_path, "cmm")
    item = load("cmm", tmp_path).items[2]
    with av.open(str(item.path)) as source, av.open(str(tmp_path / "late.mkv"), "w") as late:
        own = late.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.dts, packet.pts = (
                    packet.dts + round(2 / packet.time_base),
                    packet.pts + round(2 / packet.time_base),
                )
                packet.stream = own
                late.mux(packet)
    item = dataclasses.replace(item, path=tmp_path / "late.mkv")
    expected, found = clip_of(item, load_clip), load_clip(whole_file(item, tmp_path / "clips"))
    assert np.array_equal(found.frames, expected.frames) and abs(found.audio.size - expected.audio.size) <= 16
    assert np.corrcoef(found.audio[:15000], expected.audio[:15000])[0, 1] > 0.9


def test_cmm_is_told_how_to_answer_in_every_version(tmp_path):
    rows = records("cmm")
    write_json(tmp_path / FILES["cmm"], [rows[0], dict(rows[0], question="Did you see a dog in the video?")])
    first, second = (item.prompt for item in load("cmm", tmp_path).items)
    assert first == second == "Did you see a dog in the video? Answer with yes or no."

"""Clips with known content and questions about them: what a scene means, the formats, the same from the same seed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fmd_ext.inputs.media import load_clip
from fmd_ext.lab.eval.benchmarks import load
from fmd_ext.lab.synthetic import (
    KINDS,
    RELATIONS,
    SPLITS,
    Scene,
    questions_about,
    scene_of,
    split_scenes,
    write_dataset,
)
from fmd_ext.lab.synthetic.__main__ import main
from fmd_ext.lab.synthetic.questions import AVHBENCH_TASKS
from fmd_ext.lab.synthetic.scenes import AUDIO_RATE, HEIGHT, WIDTH, draw_picture, draw_sound


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    return folder, write_dataset(folder, "test", 6)


def answers(scene):
    """Prompt -> answer of all questions about a scene."""
    return dict(question.asked() for question in questions_about(scene))


# --- scenes ---------------------------------------------------------------------------------------------------------


def test_a_seed_always_means_the_same_scene_and_splits_share_none():
    assert [scene_of(seed) for seed in range(20)] == [scene_of(seed) for seed in range(20)]
    ranges = sorted(SPLITS.values(), key=lambda seeds: seeds.start)
    assert all(before.stop <= after.start for before, after in zip(ranges, ranges[1:], strict=False))
    assert split_scenes("val", 3)[0].seed == SPLITS["val"].start
    with pytest.raises(ValueError, match="split must be one of train, val, test, demo, got 'dev'"):
        split_scenes("dev", 3)


@pytest.mark.parametrize("relation", RELATIONS)
def test_relations_mean_what_they_say(relation):
    for seed in range(60):
        scene = scene_of(seed, relation)
        seen, heard = set(scene.visible), set(scene.heard)
        assert len(scene.heard) <= 2
        if relation == "matched":
            assert seen and seen == heard
        elif relation == "silent":
            assert heard < seen
        elif relation == "off-screen":
            assert seen < heard
        else:
            assert seen and len(heard) == len(seen) and not seen & heard


def test_every_kind_sounds_and_shows_in_every_place():
    scenes = [scene_of(seed) for seed in range(400)]
    for kind in KINDS:
        assert any(kind in scene.heard for scene in scenes)
        assert all(any(scene.seen[side] == kind for scene in scenes) for side in (0, 1))
    assert any(scene.seen[0] == scene.seen[1] is not None for scene in scenes)


# --- pictures and sounds --------------------------------------------------------------------------------------------


def look(kind, seed):
    return draw_picture((kind, None), seed, seconds=0.5).mean((0, 1, 2)) - draw_picture((None, None), seed, 0.5).mean(
        (0, 1, 2)
    )


def sound(kind, seed):
    """Loudness by band, on a logarithmic scale."""
    power = np.abs(np.fft.rfft(draw_sound([kind], seed))) ** 2
    edges = np.geomspace(20, len(power) - 1, 25).astype(int)
    return np.log(np.add.reduceat(power, edges[:-1]) + 1e-3)


@pytest.mark.parametrize("feature", [look, sound])
def test_kinds_can_be_told_apart(feature):
    """The nearest mean of the kinds is right for most clips, noisy ones included: 1 in 8 would be chance."""
    seen = {kind: np.mean([feature(kind, seed) for seed in range(8)], 0) for kind in KINDS}
    right = [
        min(seen, key=lambda name: np.linalg.norm(seen[name] - feature(kind, seed))) == kind
        for kind in KINDS
        for seed in range(100, 103)
    ]
    assert np.mean(right) > 0.4


def test_sides_are_sides():
    left, right = draw_picture(("drum", None), 3), draw_picture((None, "drum"), 3)
    ground = draw_picture((None, None), 3)
    changed = [np.abs(picture.astype(int) - ground).sum((0, 1, 3)) for picture in (left, right)]
    assert changed[0][: WIDTH // 2].sum() > 20 * changed[0][WIDTH // 2 :].sum()
    assert changed[1][WIDTH // 2 :].sum() > 20 * changed[1][: WIDTH // 2].sum()


# --- questions ------------------------------------------------------------------------------------------------------


def test_answers_about_a_scene_made_by_hand():
    said = answers(Scene(("bell", "drum"), ("drum", "frog"), "swapped", 5))
    assert said["Is the bell making sound in the audio?"] == "no"
    assert said["Is the drum making sound in the audio?"] == "yes"
    assert said["Is the frog making sound in the audio?"] == "yes"
    assert said["Is the frog visible in the video?"] == "no"
    assert said["Is the bell visible in the video?"] == "yes"
    assert said["Are the contexts of audio and visual content matching?"] == "no"
    assert said["Describe what you see and hear."] == "I see a bell and a drum. I hear a drum and a frog."
    assert said["How many musical instruments were heard throughout the video?"] == "two"
    assert said["How many sounding instruments are in the video?"] == "one"
    assert said["How many instruments in the video did not sound from beginning to end?"] == "one"
    assert said["Where is the sounding instrument?"] == "right"


def test_a_matched_and_an_empty_scene():
    said = answers(Scene(("bell", "bell"), ("bell",), "matched", 0))
    assert said["Are the contexts of audio and visual content matching?"] == "yes"
    assert said["How many types of musical instruments appeared in the video?"] == "one"
    said = answers(Scene((None, None), (), "off-screen", 0))
    assert said["Describe what you see and hear."] == "I see nothing. I hear nothing."


def test_choices_hold_the_answer_and_what_misleads():
    questions = [question for seed in range(60) for question in questions_about(scene_of(seed, "swapped"))]
    asked = [question for question in questions if question.family == "avqa" and question.needs == "audio"]
    assert asked
    for question in asked:
        assert len(set(question.choices)) == 4 and question.answer in question.choices
        prompt, letter = question.asked(instructed=True)
        assert f"{letter}. {question.answer}" in prompt


# --- files ----------------------------------------------------------------------------------------------------------


def test_the_files_are_read_by_the_benchmarks(dataset):
    folder, scenes = dataset
    for name, tasks in (("avhbench", set(AVHBENCH_TASKS)), ("music-avqa", None), ("avqa", {"Which"})):
        loaded = load(name, folder)
        assert loaded.malformed == [] and loaded.missing == []
        assert {item.video for item in loaded.items} <= {f"{scene.seed:07d}" for scene in scenes}
        if tasks is not None:
            assert {value for item in loaded.items for value in item.categories.values()} <= tasks
    expected = [q for scene in scenes for q in questions_about(scene) if q.family == "avhbench"]
    items = load("avhbench", folder).items
    assert [item.prompt for item in items] == [question.asked(instructed=True)[0] for question in expected]
    assert [item.answer for item in items] == [question.answer for question in expected]
    music = [q for scene in scenes for q in questions_about(scene) if q.family == "music_avqa"]
    assert [item.prompt for item in load("music-avqa", folder, prompt="plain").items] == [q.text for q in music]


def test_clips_are_files_with_picture_and_sound(dataset):
    folder, scenes = dataset
    truth = json.loads((folder / "scenes.json").read_text())
    assert len(truth) == len(scenes)
    for record, scene in zip(truth, scenes, strict=True):
        path = folder / "video" / f"{record['video_id']}.mp4"
        clip = load_clip(path)
        assert clip.missing is None and clip.frames.shape == (4, HEIGHT, WIDTH, 3)
        assert abs(len(clip.audio) / AUDIO_RATE - 2.0) < 0.1
        assert path.stat().st_size < 60_000
        assert tuple(record["seen"]) == scene.seen and record["relation"] == scene.relation


def test_the_same_call_writes_the_same_files(dataset, tmp_path):
    folder, _ = dataset
    write_dataset(tmp_path, "test", 2)
    for path in sorted((tmp_path / "video").iterdir()):
        assert path.read_bytes() == (folder / "video" / path.name).read_bytes()


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["synthetic", str(tmp_path), "--split", "val", "--clips", "1"])
    main()
    assert "1 clips" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["synthetic", str(tmp_path), "--clips", "0"])
    with pytest.raises(SystemExit):
        main()
    assert "1 to 1000000 clips" in capsys.readouterr().err

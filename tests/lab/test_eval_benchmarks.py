"""Published formats: what is read, what the model is asked, and what is said about files that are not as expected."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from eval_data import (
    FILES,
    MUSIC_AVQA,
    VIDEO_MME,
    VIDEOS,
    WORLDSENSE,
    WORLDSENSE_FLAT,
    records,
    write_benchmark,
    write_json,
)
from fmd_ext.lab.eval.benchmarks import BENCHMARKS, DataError, load, select
from fmd_ext.lab.eval.benchmarks.avhbench import TASKS
from fmd_ext.lab.eval.benchmarks.base import Findings

WHOLE = os.environ.get("FMD_EXT_BENCHMARKS")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmarks")
    return {name: write_benchmark(root / name, name) for name in BENCHMARKS}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_published_form(folders, name):
    loaded = load(name, folders[name])
    assert not loaded.missing
    assert {item.path.name for item in loaded.items} <= {video.split("/")[-1] for video in VIDEOS[name]}
    assert len({item.id for item in loaded.items}) == len(loaded.items)
    assert load(name, folders[name]).items == loaded.items
    for item in loaded.items:
        if item.kind == "choice":
            assert 0 <= ord(item.answer) - ord("A") < len(item.options)
        if item.kind == "word":
            assert item.answer in item.options
    assert set(loaded.benchmark.tables) <= set(loaded.items[0].categories)


def test_avhbench(folders):
    loaded = load("avhbench", folders["avhbench"])
    kinds = [item.kind for item in loaded.items]
    assert kinds == ["yes-no"] * 6 + ["caption"]
    first, last = loaded.items[0], loaded.items[-1]
    assert first.prompt == "Is the dog making sound in the audio? Answer yes or no." and first.answer == "yes"
    assert last.prompt == last.question and last.answer == "A dog barks."
    # The swapped video is a video of its own.
    assert [item.path.stem for item in loaded.items if item.categories["task"] == "AV Matching"] == [
        "00001",
        "00001_swap",
    ]


def test_avhbench_one_file_per_video(tmp_path):
    write_benchmark(tmp_path, "avhbench")
    (tmp_path / FILES["avhbench"]).unlink()
    for video in ("00002", "00001", "00001_swap"):
        write_json(tmp_path / f"json/{video}.json", [r for r in records("avhbench") if r["video_id"] == video])
    assert len(load("avhbench", tmp_path).items) == 7


def test_music_avqa(folders):
    loaded = load("music-avqa", folders["music-avqa"])
    assert [item.question for item in loaded.items] == [
        "How many musical instruments were heard throughout the video?",
        "What kind of instrument is the leftest instrument?",
        "Is the cello louder than the flute?",
        "Which instrument makes the sound first?",
    ]
    assert [item.answer for item in loaded.items] == ["one", "acoustic guitar", "yes", "flute"]
    assert [item.categories["type"] for item in loaded.items][2:] == [
        "Audio-Visual Comparative",
        "Audio-Visual Temporal",
    ]
    assert "ten" in loaded.items[0].options and "violin" not in loaded.items[0].options
    deleted = [{**record, "question_deleted": 1} for record in records("music-avqa")][:1] + records("music-avqa")[1:]
    write_json(folders["music-avqa"] / "deleted.json", deleted)
    fewer = load("music-avqa", folders["music-avqa"], questions=folders["music-avqa"] / "deleted.json")
    assert len(fewer.items) == len(MUSIC_AVQA) - 1 and fewer.digest != loaded.digest


def test_avqa(folders):
    loaded = load("avqa", folders["avqa"])
    assert [(item.answer, len(item.options)) for item in loaded.items] == [("A", 4), ("B", 2)]
    assert loaded.items[1].prompt == (
        "Where is it?\nA. street\nB. house\nAnswer with the option's letter from the given choices directly."
    )
    assert loaded.malformed == [
        "record 3 lacks multi_choice (it has video_id, id, video_name, question_text, "
        "multi_choice, answer, question_type)"
    ]


@pytest.mark.parametrize("name", ["video-mme", "worldsense"])
def test_subtitles_are_a_prompt_of_their_own(folders, name):
    plain, subtitled = load(name, folders[name]), load(name, folders[name], prompt="subtitles")
    assert "hello" not in plain.items[0].prompt.lower().replace("a. hello", "")
    assert "hello\nworld 2" in subtitled.items[0].prompt and "font" not in subtitled.items[0].prompt
    assert "{" not in plain.items[0].prompt + subtitled.items[0].prompt
    assert plain.items[0].options[0] in ("One.", "Hello")  # without its letter


def test_a_template_of_ones_own(folders):
    loaded = load("avqa", folders["avqa"], prompt="Q: {question} [{inline_options}]")
    assert (
        loaded.items[1].prompt == "Q: Where is it? [A. street B. house]" and loaded.prompt.source == "given by the user"
    )
    assert load("avqa", folders["avqa"], prompt="plain").items[1].prompt == "Where is it? A. street B. house"
    with pytest.raises(ValueError, match="the prompts are default, plain, or a template"):
        load("avqa", folders["avqa"], prompt="short")
    with pytest.raises(ValueError, match="placeholder"):
        load("avqa", folders["avqa"], prompt="{question} {hint}")


def test_everything_that_is_missing_is_listed(tmp_path):
    write_benchmark(tmp_path, "avhbench")
    for video in ("00001", "00002"):
        (tmp_path / f"video/{video}.mp4").unlink()
    loaded = load("avhbench", tmp_path)
    assert loaded.missing == ["00001", "00002"] and len(loaded.items) == 7
    assert "2 videos that are missing:" in loaded.report() and "  00002" in loaded.report()
    assert loaded.report(most=1)[-1] == "  and 1 more"


def test_records_that_are_not_as_published_are_listed(tmp_path):
    write_benchmark(tmp_path, "avhbench")
    broken = [dict(record) for record in records("avhbench")]
    broken[0]["label"] = "maybe"
    broken[1]["task"] = "Smelling"
    del broken[2]["text"]
    write_json(tmp_path / FILES["avhbench"], broken)
    malformed = load("avhbench", tmp_path).malformed
    assert [line.split(" (")[0] for line in malformed] == [
        "record 1",
        "record 2 has the task 'Smelling'; known are Video-driven Audio Hallucination, "
        "Audio-driven Video Hallucination, AV Matching, AV Captioning",
        "record 3 lacks text",
    ]


def test_a_video_that_is_there_twice_is_named(tmp_path):
    write_benchmark(tmp_path, "avhbench")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/00002.mp4").write_bytes((tmp_path / "video/00002.mp4").read_bytes())
    assert any("video 00002 is there 2 times" in line for line in load("avhbench", tmp_path).malformed)


def test_videos_lie_behind_links_and_under_paths(tmp_path):
    """Of two videos of a name the one under the path that the question gives; a link in a circle ends somewhere."""
    disk, data = tmp_path / "disk", tmp_path / "data"
    for place in ("a/clip.mp4", "ba/clip.mp4", "other.v2.mp4"):
        (disk / place).parent.mkdir(parents=True, exist_ok=True)
        (disk / place).touch()
    (disk / "circle").symlink_to(disk)
    data.mkdir()
    (data / "videos").symlink_to(disk)
    findings = Findings(data)
    for name in ("a/clip.mp4", "./a/clip", "/videos/a/clip.mp4"):
        assert findings.video(name) == data / "videos/a/clip.mp4"
    assert findings.video("videos/other.v2.mp4") == findings.video("other.v2") == data / "videos/other.v2.mp4"
    assert findings.malformed == [] and findings.missing == {}
    assert findings.video("c/clip.mp4") is None and list(findings.missing) == ["c/clip.mp4"]


def test_lines_and_parquet_read_as_lists_do(folders):
    folder = folders["video-mme"]
    (folder / "lines.jsonl").write_text("\n".join(json.dumps(record) for record in records("video-mme")))
    assert load("video-mme", folder, questions=folder / "lines.jsonl").items == load("video-mme", folder).items
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        (folder / "test.parquet").write_bytes(b"PAR1")
        with pytest.raises(DataError, match="pip install pyarrow"):
            load("video-mme", folder, questions=folder / "test.parquet")
    else:
        parquet.write_table(arrow.Table.from_pylist(records("video-mme")), folder / "test.parquet")
        assert load("video-mme", folder, questions=folder / "test.parquet").items == load("video-mme", folder).items


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"no file with questions: looked for .*val_qa\.json"),
        ("not json", "is no JSON"),
        ('{"data": []}', "must hold a list of records, got dict"),
        ("[]", "can be asked: they are empty"),
        ('[{"question": "?"}]', "can be asked: record 1 lacks question_text"),
    ],
)
def test_wrong_files_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "val_qa.json").write_text(content)
    with pytest.raises(DataError, match=message):
        load("avqa", tmp_path)


def test_wrong_names_are_told(tmp_path):
    with pytest.raises(ValueError, match="unknown benchmark 'avhbnch'; the benchmarks are avhbench"):
        load("avhbnch", tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        load("avqa", tmp_path / "nowhere")


def test_select(folders):
    items = load("avhbench", folders["avhbench"]).items
    assert select(items) == items
    assert select(items, limit=3) == [items[0], items[2], items[4]]
    assert select(items, limit=99) == items
    assert select(items, ids=[items[3].id, items[1].id]) == [items[1], items[3]]
    matching = select(items, categories=[("task", "AV Matching")])
    assert {item.video for item in matching} == {"00001", "00001_swap"}
    with pytest.raises(ValueError, match="no item has the id 'x'"):
        select(items, ids=["x"])
    with pytest.raises(ValueError, match="no item has task=Matching; values of task: AV Captioning"):
        select(items, categories=[("task", "Matching")])


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=lambda b: b.name)
def test_every_entry_of_the_table_is_complete(benchmark):
    may_lack = ("official",)  # those without a script that reads text
    fields = [field.name for field in dataclasses.fields(benchmark) if field.name not in may_lack]
    assert all(getattr(benchmark, name) is not None for name in fields)
    assert next(iter(benchmark.prompts)) == "default" and all(p.source for p in benchmark.prompts.values())
    assert "plain" in benchmark.prompts and benchmark.source


def test_worldsense_as_published_and_as_derived(folders, tmp_path):
    loaded = load("worldsense", folders["worldsense"])
    assert [item.id for item in loaded.items] == ["abcd/task0", "abcd/task1"]
    first, second = loaded.items
    assert first.categories == {
        "domain": "Daily Life",
        "task domain": "Recognition",
        "task": "Audio Recognition",
        "audio": ("Event", "Speech"),
        "duration": "1-2min",
    }
    assert (second.answer, len(second.options)) == ("D", 4)
    assert select(loaded.items, categories=[("audio", "Speech")]) == loaded.items
    # The same records by the name of their video, in place of a field.
    by_name = {"abcd": {name: value for name, value in WORLDSENSE.items() if name != "video_id"}}
    named = write_json(folders["worldsense"] / "by_name.json", by_name)
    assert load("worldsense", folders["worldsense"], questions=named).items == loaded.items
    flat = write_json(folders["worldsense"] / "flat.json", [WORLDSENSE_FLAT])
    (item,) = load("worldsense", folders["worldsense"], questions=flat).items
    assert item.id == "7" and item.path == first.path and item.categories == first.categories


def made_up(name):
    """A file with as many records as published, of the same form, about videos that are not there."""
    if name == "avhbench":
        counts = zip(TASKS, (2290, 1136, 1876, 1106), strict=True)
        return [
            {"video_id": f"{n % 900:05}", "task": task, "text": f"Is it {n}?", "label": "Yes" if n % 2 else "No"}
            for task, count in counts
            for n in range(count)
        ]
    if name == "worldsense":
        task = WORLDSENSE["task0"]
        counts = [2] * 1510 + [1] * 152
        return [
            {"video_id": f"v{n}", "duration": n % 600, "domain": f"d{n % 8}", "audio_class": ["Speech"]}
            | {f"task{k}": task for k in range(count)}
            for n, count in enumerate(counts)
        ]
    if name == "video-mme":
        return [dict(VIDEO_MME, videoID=f"v{n // 3}", question_id=f"{n // 3:03}-{n % 3 + 1}") for n in range(2700)]
    base = records("music-avqa")[0]
    rows = [dict(base, video_id=f"{n:08}", question_id=n) for n in range(9130)]
    return rows + [dict(row, anser="two") for row in rows[:55]]  # published so: the same id, another answer


@pytest.mark.parametrize("name", ["avhbench", "music-avqa", "video-mme", "worldsense"])
def test_official_forms_load_with_their_published_counts(tmp_path, name):
    write_json(tmp_path / FILES[name], made_up(name))
    loaded = load(name, tmp_path)
    version, count = next(iter(loaded.benchmark.published.items()))
    assert len(loaded.items) == count and loaded.malformed == []
    assert loaded.count_report() == [f"as many questions as published ({version})"]
    assert len({item.id for item in loaded.items}) == count
    fewer = made_up(name)[:-1]
    write_json(tmp_path / FILES[name], fewer)
    assert any("none of the published numbers" in line for line in load(name, tmp_path).count_report())


@pytest.mark.skipif(WHOLE is None, reason="FMD_EXT_BENCHMARKS names no folder with the whole published files")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_whole_published_file_has_its_published_counts(name):
    """Below FMD_EXT_BENCHMARKS each benchmark has a folder of its name; what differs in senses shares one."""
    folder = Path(WHOLE) / name.removesuffix("-deduplicated").removesuffix("-picture").removesuffix("-sound")
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    loaded = load(name, folder)
    report = loaded.count_report()
    if loaded.benchmark.published:
        assert report[0].startswith("as many questions as published"), report
    assert report[1:] == [] and loaded.malformed == []
    assert {item.kind for item in loaded.items} <= {"yes-no", "choice", "word", "caption"}


def test_a_task_of_another_size_is_told(tmp_path):
    write_json(tmp_path / FILES["avhbench"], [r for n, r in enumerate(made_up("avhbench")) if n != 5])
    report = load("avhbench", tmp_path).count_report()
    assert "2289 questions of task Video-driven Audio Hallucination, published are 2290" in report


def test_records_with_one_id_are_all_kept(tmp_path):
    """Which answer is right is not for the reader to say; the version of the file is told by its count."""
    rows = records("music-avqa")
    write_json(tmp_path / FILES["music-avqa"], [*rows, dict(rows[0], anser="two")])
    loaded = load("music-avqa", tmp_path)
    assert [(item.id, item.answer) for item in loaded.items if item.video == "00000093"] == [
        ("00000093/0", "one"),
        ("00000093/1", "acoustic guitar"),
        ("00000093/0#2", "two"),
    ]
    assert loaded.malformed == [] and loaded.doubled == ["00000093/0"]
    assert any("1 ids are there more than once, such as 00000093/0; all are kept" in line for line in loaded.report())


def test_a_file_with_other_names_of_tasks_is_refused_as_a_whole(tmp_path):
    names = {TASKS[0]: "AV Hallucination (Audio)", TASKS[1]: "AV Hallucination (Video)"}
    rows = [dict(row, task=names.get(row["task"], row["task"])) for row in records("avhbench")]
    path = write_json(tmp_path / FILES["avhbench"], rows)
    with pytest.raises(DataError) as caught:
        load("avhbench", tmp_path)
    assert str(caught.value).startswith(f"{path} is no file of AVHBench as expected: its tasks are named ")
    assert "'AV Hallucination (Audio)' (2 records), 'AV Hallucination (Video)' (2 records)" in str(caught.value)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_record_that_is_none_is_told_by_its_number(tmp_path, name):
    write_json(tmp_path / FILES[name], [*records(name)[:1], None, "text"])
    malformed = load(name, tmp_path).malformed
    assert malformed[0].startswith("record 2 is null, not an object with ")
    assert malformed[1].startswith('record 3 is "text", not an object with ')


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("avqa", {"answer": True}, "answer must be an index below 4, got True"),
        ("avqa", {"multi_choice": [True, False]}, "needs two or more choices"),
        ("music-avqa", {"anser": True}, "must be a text, got True"),
        ("music-avqa", {"anser": ["one"]}, "must be a text, got ['one']"),
        ("avhbench", {"label": True}, "has the label 'True', not Yes or No"),
        ("video-mme", {"answer": True}, "answer True is no letter"),
    ],
)
def test_a_truth_value_is_no_index_and_no_text(tmp_path, name, change, message):
    rows = records(name)
    write_json(tmp_path / FILES[name], [{**rows[0], **change}, *records(name)])
    assert message in load(name, tmp_path).malformed[0]


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "lines.jsonl").write_text(json.dumps(records("video-mme")[0]) + "\n\n{broken\n")
    with pytest.raises(DataError, match=r"lines\.jsonl, line 3 is no JSON"):
        load("video-mme", tmp_path, questions=tmp_path / "lines.jsonl")

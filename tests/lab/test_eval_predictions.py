"""The file of predictions: what is written is there, half a line is not, and nobody else writes."""

from __future__ import annotations

import json
import resource
import signal

import pytest

from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.predictions import Locked, Prediction, Results, ResultsError, Share, write_atomically


def prediction(item="a", method="vanilla", sample=0, **more):
    return Prediction(method, item, sample, "Is it?", **{"raw": "Yes", "parsed": "yes", "score": 1.0, **more})


@pytest.fixture
def results(tmp_path):
    results = Results(tmp_path / "results")
    items = [Item("a", "v", None, "Is it?", "yes-no", "yes", ("x", "y"), {"task": "t"})]
    results.begin({"model": "m", "about": {"torch": "1"}}, items)
    return results


def test_what_is_appended_is_read_again(results):
    with Share(results.share_path(0, 2)) as share:
        share.append([prediction("a"), prediction("b", raw="né\n", parsed=None)])
        share.append([prediction("a", sample=1)])
    with Share(results.share_path(1, 2)) as share:
        share.append([prediction("c")])
    found = results.predictions()
    assert list(found) == [("vanilla", "a", 0), ("vanilla", "b", 0), ("vanilla", "a", 1), ("vanilla", "c", 0)]
    assert found["vanilla", "b", 0].raw == "né\n"


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_cut_off_is_done_again(results, cut):
    path = results.share_path(0, 1)
    with Share(path) as share:
        share.append([prediction("a")])
        whole = path.read_bytes()
        share.append([prediction("b")])
    path.write_bytes(path.read_bytes()[:-cut])
    assert list(results.predictions()) == [("vanilla", "a", 0)]
    with Share(path) as share:
        assert path.read_bytes() == whole
        share.append([prediction("b")])
    assert len(results.predictions()) == 2


def test_a_damaged_line_in_the_middle_is_an_error(results):
    with Share(results.share_path(0, 1)) as share:
        share.append([prediction("a"), prediction("b")])
    path = results.share_path(0, 1)
    path.write_bytes(path.read_bytes().replace(b'{"method"', b'{"metho', 1))
    with pytest.raises(ResultsError, match=r"0-of-1\.jsonl, line 1 is no prediction"):
        results.predictions()


def test_of_two_answers_the_first_counts_and_an_error_is_replaced(results):
    with Share(results.share_path(0, 1)) as share:
        share.append([prediction("a", raw="Yes"), prediction("a", raw="No")])
        share.append([prediction("b", raw=None, error="broken file"), prediction("b", raw="Yes")])
    found = results.predictions()
    assert found["vanilla", "a", 0].raw == "Yes" and found["vanilla", "b", 0].error is None


def test_a_share_is_held_by_one(results):
    with Share(results.share_path(0, 2)):
        with pytest.raises(Locked, match="another process is at work"):
            Share(results.share_path(0, 2))
        results.refuse_others(2)
        with pytest.raises(Locked, match="another run"):
            results.refuse_others(3)
    with Share(results.share_path(0, 2)):
        pass
    results.refuse_others(3)


def test_a_folder_of_other_settings_is_refused(results):
    results.begin({"model": "n", "about": {"torch": "1"}}, [])  # nothing is held yet: it is begun anew
    assert results.settings()["model"] == "n" and results.items() == []
    results.begin({"model": "m", "about": {"torch": "1"}}, [])
    with Share(results.share_path(0, 1)) as share:
        share.append([prediction("a")])
    results.begin({"model": "m", "about": {"torch": "2"}}, [])  # versions may differ
    with pytest.raises(ResultsError, match="holds predictions with model='m', this run has 'n'"):
        results.begin({"model": "n"}, [])
    with pytest.raises(ResultsError, match="seed=None, this run has 1"):
        results.begin({"model": "m", "seed": 1}, [])
    assert results.settings()["about"] == {"torch": "1"}


def test_a_folder_from_before_a_setting_was_recorded_goes_on_as_it_was(results):
    results.begin({"model": "m"}, [])
    with Share(results.share_path(0, 1)) as share:
        share.append([prediction("a")])
    results.begin({"model": "m", "decode_split": "auto"}, [])
    with pytest.raises(ResultsError, match="decode_split='auto', this run has 'fixed'"):
        results.begin({"model": "m", "decode_split": "fixed"}, [])


SETTINGS = {"model": "m", "about": {"torch": "1"}}


def test_settings_of_a_method_are_recorded_once(results):
    results.begin(SETTINGS, [], {"fmd": {"fork_layers": 2, "alpha": 0.8}})
    results.begin(SETTINGS, [], {"vanilla": {}, "fmd": {"fork_layers": 3, "alpha": 0.8}})  # nobody has answered yet
    results.begin(SETTINGS, [], {"vanilla": {}, "fmd": {"fork_layers": 2, "alpha": 0.8}})
    with Share(results.share_path(0, 1)) as share:
        share.append([prediction("a", method="fmd")])
    assert list(results.methods()) == ["fmd", "vanilla"]
    results.begin(SETTINGS, [], {"vanilla": {"new": 1}})
    with pytest.raises(ResultsError, match="holds predictions of fmd with .*'fork_layers': 2.*, now it means"):
        results.begin(SETTINGS, [], {"fmd": {"fork_layers": 3, "alpha": 0.8}})


def test_a_second_process_that_is_refused_changes_nothing(results):
    """Also before the first answer is there, when the folder could be begun anew."""
    methods = {"fmd": {"fork_layers": 2}}
    with results.at_work(SETTINGS, results.items(), methods):
        before = {path.name: path.read_bytes() for path in results.folder.glob("*.json")}
        with results.at_work(SETTINGS, [], methods):  # the same settings: the work can be shared
            pass
        with pytest.raises(ResultsError, match="predictions of fmd with {'fork_layers': 2}, now it means"):
            results.begin(SETTINGS, [], {"fmd": {"fork_layers": 3}})
        with pytest.raises(ResultsError, match="model='m', this run has 'n'"):
            results.begin({"model": "n"}, [], methods)
        assert {path.name: path.read_bytes() for path in results.folder.glob("*.json")} == before
    results.begin({"model": "n"}, [], {"fmd": {"fork_layers": 3}})
    assert results.methods() == {"fmd": {"fork_layers": 3}}


def test_what_is_asked_adds_up_until_it_is_excluded(tmp_path):
    results, items = Results(tmp_path), [Item(name, "v", None, "Is it?", "yes-no", "yes") for name in "abcd"]
    results.begin({}, items)
    assert results.asked() is None and results.left_out() == ([], {})
    results.record_selection(items[:2])
    results.record_selection(items[2:3], ["a"])
    assert results.asked() == {"b", "c"} and results.left_out() == (["a"], {})
    results.record_selection(items[2:], (), {"questions": ["b"], "kept": False})
    assert results.asked() == {"c", "d"}
    results.record_selection(items, (), {"questions": ["b"], "kept": True})
    assert results.asked() == set("abcd") and results.left_out()[1]["kept"]


def test_a_file_that_holds_the_text_already_is_not_written_again(tmp_path):
    path = tmp_path / "items.json"
    write_atomically(path, "[1]")
    before = path.stat().st_ino
    write_atomically(path, "[1]")
    assert path.stat().st_ino == before
    write_atomically(path, "[2]")
    assert path.stat().st_ino != before and path.read_text() == "[2]"


@pytest.fixture
def small_disk():
    """No file may grow beyond 4 KiB: what a full disk does, with another number."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_names_the_file(results, small_disk):
    path = results.share_path(0, 1)
    with Share(path) as share:
        share.append([prediction("a")])
        whole = path.read_bytes()
        with pytest.raises(OSError) as caught:
            share.append([prediction("b", raw="x" * 5000)])
    assert caught.value.filename == str(path)
    assert list(results.predictions()) == [("vanilla", "a", 0)]
    with Share(path):
        assert path.read_bytes() == whole
    with pytest.raises(OSError) as caught:
        write_atomically(results.folder / "scores.json", "x" * 5000)
    assert caught.value.filename == str(results.folder / "scores.json")
    assert not list(results.folder.glob(".scores*"))  # nothing half-written stays


def test_items_are_kept_with_the_predictions(results):
    (item,) = results.items()
    assert (item.options, item.categories, item.path) == (("x", "y"), {"task": "t"}, None)


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(ResultsError, match=r"no results folder: it has no run\.json"):
        Results(tmp_path).settings()
    (tmp_path / "run.json").write_text(json.dumps({})[:1])
    with pytest.raises(ResultsError, match="is damaged"):
        Results(tmp_path).settings()

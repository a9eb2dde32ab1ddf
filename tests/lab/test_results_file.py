"""``results.json``: the tables of the results folder, nothing that may not be passed on, and no damage unseen."""

from __future__ import annotations

import json

import pytest
import torch

from fmd_ext.cli import main
from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.predictions import Prediction, Results, ResultsError, Share
from fmd_ext.lab.eval.results_file import ResultsFiles, _checksum, fingerprint, write_results
from fmd_ext.lab.eval.scores import ALL, evaluate

SECRETS = ("Is the dog there?", "/home/someone", "a secret video", "I know it", "Caption")


def make(folder, said, *, questions="digest", **more):
    """A results folder; ``said``: method to texts, None for a failure."""
    measures = ("perception accuracy", "hallucination resistance")
    items = [
        Item(
            f"{i}",
            f"a secret video {i // 2}",
            folder / f"{i}.mp4",
            "Is the dog there?",
            "yes-no",
            "no" if i % 2 else "yes",
            categories={"measure": measures[i % 2], "video file": "a secret video"},
        )
        for i in range(len(next(iter(said.values()))))
    ]
    items.append(Item("c", "v", None, "Caption it", "caption", "Caption"))
    results = Results(folder)
    about = {"files": ["/home/someone/cmm.json"], "versions": {"torch": "2.13.0"}, "machine": "a GPU"}
    run = {"benchmark": "cmm", "questions": questions, "model": "/home/someone/models/omni", "about": about, **more}
    results.begin(run, items, {method: {"fork_layers": 2} for method in said})
    results.record_selection(items)
    with Share(results.share_path(0, 1)) as share:
        for method, texts in said.items():
            for item, text in zip(items, texts, strict=False):
                error = "OSError: /home/someone/a.mp4 is broken" if text is None else None
                times = {"tokens": 2, "first_token_s": 0.25, "seconds": 0.5, "error": error}
                share.append([Prediction(method, item.id, 0, item.prompt, text, notes={"damaged clip": "x"}, **times)])
            share.append([Prediction(method, "c", 0, "Caption it", "Caption")])
    return results


SAID = {"vanilla": ["Yes", "I know it", "Yes", "Yes", None, "No"], "fmd": ["Yes", "No", "hm", "No", "Yes", "No"]}


@pytest.fixture
def results(tmp_path):
    return make(tmp_path / "results", SAID)


@pytest.mark.parametrize("protocol", ["ours", "official"])
def test_it_gives_the_folders_tables(results, protocol):
    folder, file = (evaluate(r, protocol=protocol) for r in (results, ResultsFiles([write_results(results)])))
    for name in ("tables", "reread", "averages", "items_needed", "detectable", "flips"):
        assert file.as_json()[name] == folder.as_json()[name], name
    assert (file.counts.answered, file.counts.failed, file.counts.notes) == (
        5,
        1,
        {"damaged clip": {"vanilla": 6, "fmd": 6}},
    )
    assert file.speed["fmd"]["seconds_per_answer"] == 0.5
    right = {"ours": 3 / 5, "official": 4 / 5}[protocol]
    assert file.tables[0].rows[ALL]["vanilla"].accuracy.value == pytest.approx(right)


def test_what_may_not_be_passed_on_is_not_in_it(results):
    text = write_results(results).read_text()
    assert not [secret for secret in SECRETS if secret in text]
    assert str(results.folder) not in text
    content = json.loads(text)
    assert content["run"]["model"] == "omni" and content["run"]["about"]["files"] == ["cmm.json"]
    assert content["run"]["about"]["versions"] == {"torch": "2.13.0"} and content["methods"]["fmd"] == {
        "fork_layers": 2
    }
    row = next(row for row in content["answers"] if (row["method"], row["item"]) == ("vanilla", "1"))
    assert row["read"] == {"ours": None, "official": "no"} and row["correct"] == {"ours": 0, "official": 1}
    assert {row["error"] for row in content["answers"]} == {None, "OSError: … is broken"}
    assert content["questions"][2] == {
        "id": "2",
        "kind": "yes-no",
        "answer": "yes",
        "cluster": 1,
        "categories": {"measure": ["perception accuracy"]},
    }


def test_a_hubs_name_stays(tmp_path):
    results = make(tmp_path, SAID, model="Qwen/Qwen2.5-Omni-7B")
    assert json.loads(write_results(results).read_text())["run"]["model"] == "Qwen/Qwen2.5-Omni-7B"


def rewritten(path, change):
    """The file with its content changed, and a checksum that fits."""
    content = json.loads(path.read_text())
    change(content)
    content["sha256"] = _checksum(content)
    path.write_text(json.dumps(content))


def test_a_damaged_file_is_refused(results):
    path = write_results(results)
    whole = path.read_text()

    def refused(text, message):
        path.write_text(text)
        with pytest.raises(ResultsError, match=message):
            ResultsFiles([path])

    refused(whole[: len(whole) // 2], r"results\.json is damaged, or no results file")
    refused(whole.replace('"correct": {"ours": 1', '"correct": {"ours": 0', 1), "its checksum does not fit")
    refused(whole.replace('"version": 1', '"version": 2'), "has version 2; this fmd_ext reads version 1")
    refused(whole.replace("fmd_ext results", "other"), 'its "schema" must be "fmd_ext results"')
    refused("[]", "is no results file")
    content = json.loads(whole)
    del content["answers"]
    refused(json.dumps(content), "is damaged: it lacks answers")
    path.write_text(whole)
    rewritten(path, lambda content: content["answers"][0]["correct"].update(ours=0))
    with pytest.raises(ResultsError, match="contradicts itself: fmd about 0 is marked wrongly"):
        ResultsFiles([path])
    path.write_text(whole)
    rewritten(path, lambda content: content["run"].update(benchmark="sniffing"))
    with pytest.raises(ResultsError, match="is about 'sniffing', a benchmark that this fmd_ext does not know"):
        ResultsFiles([path])


def test_two_files_are_compared_on_what_both_answered(results, tmp_path):
    own = write_results(results)
    other = write_results(
        make(tmp_path / "theirs", {"vanilla": ["Yes", "No", "Yes", None, "Yes", "No"]}, dtype="bfloat16")
    )
    files = ResultsFiles([own, other])
    evaluation = evaluate(files, baseline=f"vanilla [{own}]")
    assert evaluation.methods == [f"vanilla [{own}]", f"fmd [{own}]", f"vanilla [{other}]"]
    assert evaluation.counts.answered == 4 and files.differ == ["dtype"]
    assert evaluation.flips[f"vanilla [{other}]"] == {"gained": ["1"], "lost": []}
    with pytest.raises(ResultsError, match="is given twice"):
        ResultsFiles([own, own])
    third = write_results(make(tmp_path / "third", SAID, questions="another"))
    with pytest.raises(
        ResultsError, match="is not about the questions of .*: cmm, questions another, not cmm, questions"
    ):
        ResultsFiles([own, third])


def test_the_command(results, tmp_path, capsys):
    path = write_results(results)
    assert main(["compare", str(path), "--protocol", "official"]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith(f"{path}: CMM; omni; a GPU; torch 2.13.0") and "reading: official: " in out
    assert "5 of 6 questions answered by every method, 1 failed" in out and "against vanilla" in out
    other = write_results(make(tmp_path / "theirs", SAID, dtype="bfloat16"))
    assert main(["compare", str(path), str(other)]) == 0
    assert "the files differ in dtype: so may the answers" in capsys.readouterr().err
    path.write_text(path.read_text()[:-100])
    assert main(["compare", str(path)]) == 2
    assert f"{path} is damaged" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "nowhere.json")]) == 2
    assert "nowhere.json" in capsys.readouterr().err


def test_weights_are_told_apart():
    torch.manual_seed(0)
    one, other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    assert fingerprint(one) != fingerprint(other)
    other.load_state_dict(one.state_dict())
    assert fingerprint(one) == fingerprint(other)
    assert fingerprint(torch.nn.Linear(3, 3, device="meta")) is None

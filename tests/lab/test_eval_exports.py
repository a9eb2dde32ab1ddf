"""In and out: answers made elsewhere are scored as our own, and what is exported can be read by others."""

from __future__ import annotations

import csv
import io
import json

import pytest

from eval_data import FILES, records, write_benchmark, write_json
from fmd_ext.cli import main
from fmd_ext.lab.eval.benchmarks import BENCHMARKS, DataError, load
from fmd_ext.lab.eval.elsewhere import read_answers, take_in
from fmd_ext.lab.eval.exports import OFFICIAL, as_csv, as_latex, export
from fmd_ext.lab.eval.parsing import parse_answer
from fmd_ext.lab.eval.predictions import Prediction, Results, ResultsError, Share
from fmd_ext.lab.eval.scores import ALL, evaluate


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    for name in BENCHMARKS:
        write_json(root / name / FILES[name], records(name))
    return root


@pytest.fixture
def loaded(folders):
    return load("avhbench", folders / "avhbench")


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers_of(loaded, wrong=()):
    return {
        item.id: ("Yes" if item.answer == "no" else "No") if item.id in wrong else item.answer.capitalize()
        for item in loaded.items
    }


def test_answers_made_elsewhere_are_scored_beside_ours(loaded, tmp_path):
    results = Results(tmp_path)
    first = loaded.items[0].id
    theirs, better = answers_of(loaded, wrong=[first]), answers_of(loaded)
    take_in(results, loaded, loaded.items, {"theirs": theirs}, {"theirs": "theirs.jsonl"})
    assert evaluate(results).tables[0].rows[ALL]["theirs"].accuracy.value == pytest.approx(5 / 6)
    with Share(results.share_path(0, 1)) as share:
        share.append(
            Prediction("vanilla", i.id, 0, i.prompt, better[i.id], tokens=1, first_token_s=0.1, seconds=0.2)
            for i in loaded.items
        )
    evaluation = evaluate(results)
    assert evaluation.methods == ["vanilla", "theirs"] and list(evaluation.speed) == ["vanilla"]
    assert evaluation.flips["theirs"] == {"gained": [], "lost": [first]}
    assert results.methods() == {"theirs": {"made_elsewhere": "theirs.jsonl"}}
    # Mended, they replace what was there; under our own method's name they are refused.
    take_in(results, loaded, loaded.items, {"theirs": better}, {"theirs": "mended.jsonl"})
    assert evaluate(results).flips["theirs"]["lost"] == []
    with pytest.raises(ResultsError, match="answers of its own by vanilla: give these another name"):
        take_in(results, loaded, loaded.items, {"vanilla": better}, {"vanilla": "x"})
    other = load("avqa", loaded.files[0].parents[2] / "avqa")
    with pytest.raises(ResultsError, match="answers to other questions"):
        take_in(results, other, other.items, {}, {})


def test_questions_without_an_answer_are_not_asked_yet(loaded, tmp_path):
    results = Results(tmp_path)
    some = dict(list(answers_of(loaded).items())[:4])
    take_in(results, loaded, loaded.items, {"theirs": some}, {"theirs": "x"})
    counts = evaluate(results).counts
    assert (counts.asked, counts.answered, counts.unfinished, counts.failed) == (7, 4, 3, 0)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"id": "x", "answer": "Yes"}], "line 1: no question has the id 'x'; --check --export FOLDER writes the ids"),
        ([{"id": "ID"}], r'line 1 must be {"id": ..., "answer": "..."}, got {"id": '),
        ([{"id": "ID", "answer": True}], "line 1 must be"),
        (["Yes"], "line 1 must be"),
        ([{"id": "ID", "answer": "Yes"}, {"id": "ID", "answer": "No"}], "line 2: the id 'ID' is there for the second"),
        ([], "holds no answers"),
    ],
)
def test_wrong_answers_are_told_by_their_line(loaded, tmp_path, rows, message):
    first = loaded.items[0].id
    rows = [{**row, "id": row["id"].replace("ID", first)} if isinstance(row, dict) else row for row in rows]
    path = jsonl(tmp_path / "answers.jsonl", rows)
    with pytest.raises(DataError) as caught:
        read_answers(path, loaded.items)
    assert message.replace("ID'", f"{first}'") in str(caught.value)
    path.write_text("{broken\n")
    with pytest.raises(DataError, match=r"answers\.jsonl, line 1 is no JSON"):
        read_answers(path, loaded.items)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_official_records_hold_the_question_and_the_response(folders, name):
    """They are in the published form: read again by our own reader they give the same questions."""
    loaded = load(name, folders / name)
    said = [(item, f"reply to {item.id}") for item in loaded.items]
    rows = OFFICIAL[name](said)
    flat = [question for row in rows for question in row["questions"]] if name == "video-mme" else rows
    assert [row["pred" if name == "cmm" else "response"] for row in flat] == [raw for _, raw in said]
    assert set(OFFICIAL) == set(BENCHMARKS)
    if name == "video-mme":
        assert rows[0]["video_id"] == "fFjv93ACGo8" and flat[0]["options"][2] == "C. Three."
    elif name.startswith("avhbench"):
        assert [{key: row[key] for key in ("video_id", "task", "text", "label")} for row in rows] == records(name)
    elif name == "avqa":
        published = [record for record in records(name) if record["multi_choice"]]
        assert [(row["multi_choice"], row["answer"]) for row in rows] == [
            (record["multi_choice"], record["answer"]) for record in published
        ]
    elif name == "worldsense":
        assert rows[0]["candidates"] == ["A. Hello", "B. Goodbye", "C. Nothing"] and rows[0]["answer"] == "A"
    elif name == "cmm":
        paths = [(None, "visual-language/a.mp4"), ("audio-language/b.wav", None)]
        assert [(row["audio_path"], row["video_path"]) for row in rows[:2]] == paths
        assert [row["answer"] for row in rows] == ["yes", "no", "no"] and rows[2]["video_path"] == "visual-audio/c.mp4"
    elif name.startswith("daily-omni"):
        keys = ("video_id", "Question", "Choice", "Answer", "Type", "video_category", "video_duration")
        assert [{key: row[key] for key in keys} for row in rows] == [
            {key: record[key] for key in keys} for record in records(name)
        ]
    else:
        assert rows[2]["type"] == '["Audio-Visual", "Comparative"]' and rows[1]["anser"] == "acoustic guitar"


@pytest.fixture
def results(loaded, tmp_path):
    results = Results(tmp_path / "results")
    pairs = {"A&B_50%": answers_of(loaded, wrong=[loaded.items[1].id]), "fmd:alpha=0.9": answers_of(loaded)}
    take_in(results, loaded, loaded.items, pairs, dict.fromkeys(pairs, "x"))
    return results


def test_tables_for_spreadsheets_and_papers(results):
    evaluation = evaluate(results)
    rows = list(csv.DictReader(io.StringIO(as_csv(evaluation))))
    assert [row["group"] for row in rows if row["table"] == "task" and row["method"] == "fmd:alpha=0.9"] == list(
        evaluation.tables[1].rows
    )
    cell = evaluation.tables[0].rows[ALL]["fmd:alpha=0.9"]
    row = next(row for row in rows if row["table"] == ALL and row["method"] == "fmd:alpha=0.9")
    assert float(row["accuracy"]) == pytest.approx(cell.accuracy.value, rel=1e-5) and row["items"] == "6"
    assert float(row["difference"]) == pytest.approx(cell.comparison.difference.value, rel=1e-5)
    assert float(row["p"]) == pytest.approx(cell.comparison.p_value) and row["precision"] == "1"
    first = next(row for row in rows if row["method"] == "A&B_50%")
    assert first["difference"] == "" and first["adjusted_p"] == "" and first["reading"] == "ours"
    latex = as_latex(evaluation)
    assert r"all & A\&B\_50\% & fmd $\alpha$0.9 \\" in latex and latex.count(r"\toprule") == 2
    half = 50 * (cell.accuracy.high - cell.accuracy.low)
    assert f"& 100.0 $\\pm$ {half:.1f} \\\\" in latex


def test_cmm_is_exported_as_its_script_reads_it(folders, tmp_path):
    """A record per line, the reply as ``pred``; counted as that script counts, it has our official figures."""
    loaded, results = load("cmm", folders / "cmm"), Results(tmp_path / "results")
    replies = dict(zip([item.id for item in loaded.items], ["I know", "I know", "Yes."], strict=True))
    take_in(results, loaded, loaded.items, {"theirs": replies}, {"theirs": "x"})
    evaluation = evaluate(results, protocol="official")
    export(results, evaluation, tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out/official-theirs.json").read_text().splitlines()]
    right = [row["answer"].lower() in row["pred"].strip().lower()[:5] for row in rows]
    assert right == [False, True, False]
    assert evaluation.tables[0].rows[ALL]["theirs"].accuracy.value == pytest.approx(sum(right) / 3)
    measures = {name: cells["theirs"].accuracy.value for name, cells in evaluation.tables[1].rows.items()}
    assert measures == {"perception accuracy": 0.0, "hallucination resistance": 0.5}
    assert evaluation.averages["measure"]["theirs"].value == 0.25


def test_names_that_differ_in_signs_alone_are_told_apart(loaded, tmp_path):
    results = Results(tmp_path / "results")
    pairs = {"a b": answers_of(loaded, wrong=[loaded.items[0].id]), "a/b": answers_of(loaded)}
    take_in(results, loaded, loaded.items, pairs, dict.fromkeys(pairs, "x"))
    evaluation = evaluate(results)
    assert evaluation.tables[0].rows[ALL]["a/b"].accuracy.value == 1
    assert len(set(export(results, evaluation, tmp_path / "out"))) == 8


def test_files_for_scorers_and_judges(results, loaded, tmp_path):
    paths = {path.name for path in export(results, evaluate(results), tmp_path / "out")}
    assert paths == {path.name for path in (tmp_path / "out").iterdir()} and len(paths) == 8
    rows = [json.loads(line) for line in (tmp_path / "out/answers-fmd-α0.9.jsonl").read_text().splitlines()]
    items = {item.id: item for item in loaded.items}
    assert [parse_answer(items[row["id"]], row["answer"]) for row in rows[:6]] == [row["reference"] for row in rows[:6]]
    # What we export is what we take.
    assert read_answers(tmp_path / "out/answers-fmd-α0.9.jsonl", loaded.items) == {
        row["id"]: row["answer"] for row in rows
    }
    requests = [json.loads(line) for line in (tmp_path / "out/judge-fmd-α0.9.jsonl").read_text().splitlines()]
    asked = requests[0]["messages"][0]["content"]
    assert requests[0]["custom_id"] == rows[0]["id"] and "Right answer: yes\nReply: Yes" in asked
    assert "Rate from 0 to 10" in requests[6]["messages"][0]["content"]


def test_from_exported_questions_to_scores(folders, tmp_path, capsys):
    """Without a model and without videos."""
    write_benchmark(tmp_path / "data", "avqa")
    write_json(tmp_path / "data" / FILES["avqa"], records("avqa")[:2])
    base = ["eval", "--benchmark", "avqa", "--data", str(tmp_path / "data")]
    assert main([*base, "--check", "--export", str(tmp_path / "out")]) == 0
    questions = [json.loads(line) for line in (tmp_path / "out/questions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in questions] == ["11", "12"] and "A. dog" in questions[0]["prompt"]
    answers = jsonl(tmp_path / "their.jsonl", [{"id": row["id"], "answer": "A"} for row in questions])
    (tmp_path / "data/videos/clip_a.mp4").unlink()
    run = [*base, "--predictions", f"theirs={answers}", "--output", str(tmp_path / "results")]
    code = main([*run, "--export", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "2 of 2 questions answered by every method" in out and "exported: 5 files" in out
    assert (tmp_path / "out/tables.csv").read_text().count("theirs") == 3
    assert main([*base, "--predictions", "theirs=nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err

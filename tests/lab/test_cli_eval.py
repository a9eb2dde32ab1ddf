"""``fmd-ext eval``: generated data in the form of three benchmarks from end to end; and what is said when it fails."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from eval_data import FILES, records, write_benchmark, write_json
from fmd_ext.cli import main
from fmd_ext.lab.synthetic import write_dataset
from fmd_ext.lab.tiny import save_random_model
from fmd_ext.ops import dispatch

QUICK = ["--max-new-tokens", "3", "--max-frame-pixels", "3136", "--max-frames", "4", "--quiet"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli_eval")
    write_dataset(folder / "data", "test", 3)
    save_random_model(folder / "model", seed=1)
    return folder / "data"


@pytest.fixture
def fmd(capsys):
    """Runs ``fmd-ext eval``; gives exit code, stdout and stderr."""

    def run(*arguments):
        try:
            code = main(["eval", *(str(argument) for argument in arguments)])
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize(
    "benchmark, table", [("avhbench", "by task"), ("music-avqa", "by modality"), ("avqa", "by type")]
)
def test_the_whole_chain(fmd, data, tmp_path, monkeypatch, benchmark, table):
    run = ["--benchmark", benchmark, "--data", data, "--model", data.parent / "model", "--output", tmp_path]
    run += ["--limit", "6"]
    code, out, err = fmd(*run, *QUICK, "--method", "vanilla,fmd-attention:fork_layers=2", "--batch-size", "2")
    assert code == 0, err
    assert f"accuracy {table}" in out and "against vanilla" in out and "first token" in out
    assert "weights are random" in err
    before = {path: path.read_bytes() for path in (tmp_path / "shares").glob("*")}
    predictions = (tmp_path / "predictions.jsonl").read_text().splitlines()
    asked = len(predictions) // 2
    assert asked == {"avhbench": 6, "music-avqa": 6, "avqa": 3}[benchmark]
    assert {json.loads(line)["method"] for line in predictions} == {"vanilla", "fmd-attention:fork_layers=2"}
    settings = json.loads((tmp_path / "run.json").read_text())
    methods = json.loads((tmp_path / "methods.json").read_text())
    assert methods["fmd-attention:fork_layers=2"]["text_weight"] == 0.5  # a default, in force
    assert settings["decode_split"] == "auto"
    assert settings["prompt"] and settings["about"]["versions"]["torch"] and settings["decoding"]["max_new_tokens"] == 3

    # Again with one method more: only that one is run. And without model and data: only scored.
    code, out, err = fmd(*run, *QUICK, "--method", "vanilla,fmd", "--fork-layers", "3", "--batch-size", "2")
    assert code == 0 and "fmd L3 = fmd:fork_layers=3" in out
    assert (tmp_path / "shares/0-of-1.jsonl").read_bytes().startswith(before[tmp_path / "shares/0-of-1.jsonl"])
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 3 * asked
    sent = (tmp_path / "results.json").read_text()
    about = json.loads(sent)["run"]["about"]
    assert about["device"] == "cpu" and about["versions"]["transformers"] and len(about["model_fingerprint"]) == 64
    assert str(tmp_path) not in sent and str(data) not in sent and str(data.parent) not in sent
    code, scored, _ = fmd("--score-only", "--output", tmp_path)
    assert code == 0 and f"\n{asked} of {asked} questions answered by every method\n" in scored
    assert f"answer cut off: {asked} by vanilla" in scored  # after three tokens
    code, _, err = fmd(*run, *QUICK, "--batch-size", "3")
    assert code == 2 and "holds predictions with batch_size=2, this run has 3" in err
    monkeypatch.setattr(dispatch._split, "value", "fixed")
    code, _, err = fmd(*run, *QUICK, "--batch-size", "2")
    assert code == 2 and "holds predictions with decode_split='auto', this run has 'fixed'" in err


def test_speed_is_measured_apart(fmd, data, tmp_path):
    run = ["--benchmark", "avqa", "--data", data, "--model", data.parent / "model", "--output", tmp_path]
    code, out, err = fmd(*run, "--limit", "1", "--speed", "1", "--method", "vanilla,fmd", *QUICK)
    assert code == 0, err
    assert "speed: 1 prompts of about" in out and "32 new ones" in out
    speed = json.loads((tmp_path / "speed.json").read_text())
    assert speed["methods"]["vanilla"]["first_token_ratio"] == [1, 1, 1]
    assert speed["methods"]["fmd"]["tokens_per_s"] > 0 and speed["methods"]["fmd"]["peak_bytes"] is None


def test_check_says_what_is_missing(fmd, tmp_path):
    write_benchmark(tmp_path, "avhbench")
    check = ["--benchmark", "avhbench", "--data", tmp_path]
    code, out, _ = fmd(*check, "--check")
    assert code == 0 and out.splitlines()[0] == "AVHBench: 7 questions about 3 videos (6 yes-no, 1 caption)"
    (tmp_path / "video/00002.mp4").unlink()
    code, out, _ = fmd(*check, "--check")
    assert code == 1 and "1 videos that are missing:\n  00002\n" in out
    code, _, err = fmd(*check)
    assert code == 2 and "1 videos are missing, among them 00002: --check lists them" in err
    (tmp_path / "video/00002.mp4").write_bytes(b"no clip")
    code, out, _ = fmd(*check, "--check")
    assert code == 1 and f"1 files that cannot be opened:\n  {tmp_path / 'video/00002.mp4'} is no media file" in out


def test_malformed_records_stop_a_run_until_it_is_allowed(fmd, data, tmp_path):
    """Else most of a file of another version could be refused, and the rest be scored as if it were all."""
    write_benchmark(tmp_path, "avhbench")
    records_ = records("avhbench")
    records_[0]["label"] = "maybe"
    write_json(tmp_path / FILES["avhbench"], records_)
    run = [
        "--benchmark",
        "avhbench",
        "--data",
        tmp_path,
        "--model",
        data.parent / "model",
        "--method",
        "vanilla",
        *QUICK,
    ]
    run += ["--output", tmp_path / "results"]
    code, out, err = fmd(*run)
    assert code == 2 and "1 records are not as published, the first: record 1 (Video" in err
    assert "6 questions are none of the published numbers: 6408 in all tasks" in out
    code, out, err = fmd(*run, "--allow-malformed", "--limit", "2")
    assert code == 0, err
    assert "2 of 2 questions answered by every method\nleft out: 1 malformed records" in out


def test_a_question_that_fails_is_told_and_can_be_left_out(fmd, data, tmp_path):
    write_benchmark(tmp_path, "avhbench")
    (tmp_path / "video/00002.mp4").write_bytes(b"no clip")
    run = [
        "--benchmark",
        "avhbench",
        "--data",
        tmp_path,
        "--model",
        data.parent / "model",
        "--method",
        "vanilla",
        *QUICK,
    ]
    run += ["--output", tmp_path / "results"]
    code, out, err = fmd(*run)
    assert code == 1 and "5 of 7 questions answered by every method, 2 failed" in out
    assert "2 answers are missing: " in out and "--retry-failed asks them again" in err
    assert fmd(*run)[0] == 1  # nothing is asked again, and nothing is forgotten
    name = "00002/Audio-driven Video Hallucination/1"
    (tmp_path / "ids.txt").write_text(f"00002/AV Captioning/1\n\n{name}\n")
    code, out, err = fmd(*run, "--exclude", f"@{tmp_path / 'ids.txt'}")
    assert code == 0, err
    assert "5 of 5 questions answered by every method\nleft out: 2 excluded by hand" in out
    code, _, err = fmd(*run, "--exclude", "00003")
    assert code == 2 and "no item has the id '00003'" in err
    code, _, err = fmd(*run, "--exclude", "@nowhere")
    assert code == 2 and "nowhere" in err


def test_a_lost_device_says_how_to_go_on(fmd, data, tmp_path, monkeypatch):
    def lost(*args, **more):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr("fmd_ext.lab.eval.run.answer", lost)
    run = ["--benchmark", "avqa", "--data", data, "--model", data.parent / "model", "--limit", "2", *QUICK]
    code, _, err = fmd(*run, "--output", tmp_path)
    assert code == 2 and "device-side assert triggered; the same command in a new process goes on" in err
    monkeypatch.undo()
    code, out, _ = fmd(*run, "--output", tmp_path, "--speed", "2")
    assert code == 1 and "1 of 2 questions answered by every method, 1 failed" in out
    assert "speed: 1 prompts" in out  # of what can be asked


def test_settings_of_the_checkpoint_are_told_recorded_and_compared(fmd, data, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(data.parent / "model", model)
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.8}))
    run = ["--benchmark", "avqa", "--data", data, "--model", model, "--limit", "1", "--method", "vanilla", *QUICK]
    code, _, err = fmd(*run, "--output", tmp_path / "neutral")
    assert (
        code == 0 and "generation_config has no effect here: repetition_penalty=1.8 (--generation-config model" in err
    )
    neutral = json.loads((tmp_path / "neutral/run.json").read_text())
    assert "repetition_penalty" not in neutral["generation"]
    assert neutral["about"]["checkpoint_generation_config"] == {"repetition_penalty": 1.8}
    code, _, err = fmd(*run, "--output", tmp_path / "neutral", "--generation-config", "model")
    assert code == 2 and "'generation_config': 'neutral'" in err
    own = [*run, "--output", tmp_path / "own", "--generation-config", "model"]
    assert fmd(*own)[0] == 0
    assert json.loads((tmp_path / "own/run.json").read_text())["generation"]["repetition_penalty"] == 1.8
    path.write_text(path.read_text().replace("1.8", "1.2"))
    code, _, err = fmd(*own)
    assert code == 2 and "holds predictions with generation={" in err


def test_list(fmd):
    code, out, _ = fmd("--list")
    assert code == 0 and "avhbench" in out and "fmd-zero" in out and "mask_scale" in out


def test_a_folder_that_cannot_be_written_is_named(fmd, data, tmp_path):
    """A file in its place stands for a disk that is full or not ours."""
    (tmp_path / "file").touch()
    run = ["--benchmark", "avqa", "--data", data, "--model", data.parent / "model", "--limit", "1", *QUICK]
    code, _, err = fmd(*run, "--output", tmp_path / "file")
    assert code == 2 and f"{tmp_path / 'file'}" in err and "Traceback" not in err
    assert fmd(*run, "--method", "vanilla", "--output", tmp_path / "results")[0] == 0
    code, _, err = fmd("--score-only", "--output", tmp_path / "results", "--report", tmp_path / "file" / "report.html")
    assert code == 2 and f"{tmp_path / 'file'}" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--benchmark and --data say what to ask"),
        (["--score-only"], "--score-only needs the results folder"),
        (["--score-only", "--output", "DATA"], "is no results folder: it has no run.json"),
        (["--benchmark", "avh", "--data", "DATA"], "unknown benchmark 'avh'"),
        (["--benchmark", "avqa", "--data", "nowhere"], "no such folder: nowhere"),
        (["--benchmark", "video-mme", "--data", "DATA"], "no file with questions"),
        (["--benchmark", "avqa", "--data", "DATA", "--method", "fdm"], "unknown method 'fdm'"),
        (["--benchmark", "avqa", "--data", "DATA", "--method", "fmd:alpha=2"], "alpha must be in [0, 1], got 2"),
        (["--benchmark", "avqa", "--data", "DATA", "--item", "x"], "no item has the id 'x'"),
        (
            ["--benchmark", "avqa", "--data", "DATA", "--category", "type=Why"],
            "no item has type=Why; values of type: Which",
        ),
        (["--benchmark", "avqa", "--data", "DATA", "--category", "type"], "must be NAME=VALUE, got 'type'"),
        (["--benchmark", "avqa", "--data", "DATA", "--samples", "2"], "more with a temperature above 0, got 2"),
        (["--benchmark", "avqa", "--data", "DATA", "--prompt", "long"], "avqa has no prompt 'long'"),
    ],
)
def test_wrong_input_is_told_in_a_line(fmd, data, arguments, message):
    code, _, err = fmd(*(str(data) if argument == "DATA" else argument for argument in arguments))
    assert code == 2 and message in err and "Traceback" not in err

"""``fmd-ext eval``: generated data in the form of three benchmarks from end to end; and what is said when it fails."""

from __future__ import annotations

import json

import pytest

from eval_data import write_benchmark
from fmd_ext.cli import main
from fmd_ext.lab.synthetic import write_dataset
from fmd_ext.lab.tiny import save_random_model

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
def test_the_whole_chain(fmd, data, tmp_path, benchmark, table):
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
    assert settings["prompt"] and settings["about"]["versions"]["torch"] and settings["decoding"]["max_new_tokens"] == 3

    # Again with one method more: only that one is run. And without model and data: only scored.
    code, out, err = fmd(*run, *QUICK, "--method", "vanilla,fmd", "--fork-layers", "3", "--batch-size", "2")
    assert code == 0 and "fmd:fork_layers=3" in out
    assert (tmp_path / "shares/0-of-1.jsonl").read_bytes().startswith(before[tmp_path / "shares/0-of-1.jsonl"])
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 3 * asked
    code, scored, _ = fmd("--score-only", "--output", tmp_path)
    assert code == 0 and "questions scored" in scored.splitlines()[0]
    code, _, err = fmd(*run, *QUICK, "--batch-size", "3")
    assert code == 2 and "holds predictions with batch_size=2, this run has 3" in err


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

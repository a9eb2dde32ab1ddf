"""``fmd-ext calibrate`` and ``fmd-ext curves`` on generated data, and the file they leave in use."""

from __future__ import annotations

import json

import pytest

from fmd_ext import FMDConfig
from fmd_ext.cli import main
from fmd_ext.lab.synthetic import write_dataset
from fmd_ext.lab.tiny import save_random_model

QUICK = ["--max-frame-pixels", "3136", "--max-frames", "4", "--batch-size", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate")
    write_dataset(folder / "data", "val", 6)
    save_random_model(folder / "model", seed=1)
    return folder


@pytest.fixture
def fmd(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)

    def run(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = exit_.code
        return (code, *capsys.readouterr())

    return run


CALIBRATE = ["calibrate", "--benchmark", "avhbench", "--data", "data", "--model", "model"]


def test_from_questions_to_a_file_that_other_commands_load(fmd, folder):
    arguments = ["--samples", "3", "--validation", "4", "--depths", "2,1", "--mask-scale", "0.1", "--plots", "plots"]
    code, out, err = fmd(*CALIBRATE, *arguments, *QUICK)
    assert code == 0, err
    assert "weights are random" in err and "chosen" in out and "vanilla" in out
    config = FMDConfig.from_file(folder / "fmd.json")
    record = json.loads((folder / "fmd.json").read_text())["calibration"]
    assert config.fork_layers in (1, 2) and (config.masking, config.mask_scale) == ("zero", 0.1)
    assert config.alpha == record["alpha"][config.fork_layers - 1]["alpha"]
    assert len(record["measured_on"]) == 3 and len(record["validated_on"]) == 4
    measured, validated = (set(record["videos"][name]) for name in ("measured", "validated"))
    assert measured and validated and not measured & validated
    assert {name.split("/")[0] for name in record["measured_on"]} == measured
    assert [score["fork_layers"] for score in record["depths"]] == [1, 2]
    accuracy = record["accuracy"]
    assert accuracy["difference"]["value"] == pytest.approx(accuracy["chosen"] - accuracy["vanilla"])
    assert ("vanilla decoding is better on the validation questions" in err) == accuracy["vanilla_is_better"]
    assert {path.name for path in (folder / "plots").iterdir()} == {"alpha.png", "fork_depth.png"}

    evaluate = ["eval", "--benchmark", "avhbench", "--data", "data", "--model", "model", "--limit", "2", "--quiet"]
    methods = "vanilla,fmd-zero:mask_scale=0.0,fmd-zero:mask_scale=0.5"
    more = ["--config", "fmd.json", "--method", methods, "--max-new-tokens", "2"]
    code, out, err = fmd(*evaluate, *more, "--output", "results", *QUICK)
    assert code == 0, err
    asked = {json.loads(line)["item"] for line in (folder / "results/shares/0-of-1.jsonl").read_text().splitlines()}
    assert asked and not {name.split("/")[0] for name in asked} & (measured | validated)
    assert "videos that fmd.json was calibrated on are left out" in err and "about videos of the calibration" in out
    alpha = json.dumps(config.alpha).replace(" ", "").replace('"', "'")
    said = [json.loads(line)["method"] for line in (folder / "results/shares/0-of-1.jsonl").read_text().splitlines()]
    assert any(f"alpha={alpha}" in method and "mask_scale=0.5" in method for method in said)
    code, out, err = fmd("curves", "results", "--out", "curves.svg", "--json", "curves.json")
    assert code == 0, err
    assert "accuracy by mask scale" in out and "<svg" in (folder / "curves.svg").read_text()
    (line,) = json.loads((folder / "curves.json").read_text())["mask scale"]
    assert line["x"] == [0.0, 0.5]

    # Only about the calibration's videos: refused, or asked and said so.
    own = [*evaluate, "--config", "fmd.json", "--item", record["measured_on"][0], "--method", "vanilla", *QUICK]
    code, _, err = fmd(*own, "--output", "own")
    assert code == 2 and "all that is asked are 1 questions about 1 videos that fmd.json was calibrated on" in err
    code, out, err = fmd(*own, "--output", "own", "--keep-calibration-videos")
    assert code == 0 and "1 questions are about videos that the settings were calibrated on" in out


def test_a_given_depth_needs_no_validation(fmd, folder):
    given = ["--samples", "2", "--validation", "0", "--fork-layers", "3", "--out", "given.json"]
    code, _, err = fmd(*CALIBRATE, *given, *QUICK)
    assert code == 0, err
    assert FMDConfig.from_file(folder / "given.json").fork_layers == 3
    record = json.loads((folder / "given.json").read_text())["calibration"]
    assert record["accuracy"] is None and record["videos"]["validated"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--masking", "attention"], "there is no alpha to measure"),
        (["--alpha", "0.8"], "alpha is what is measured"),
        (["--fork-layers", "auto"], "fork_layers=auto needs no calibration"),
        (["--depths", "0,1"], "argument --depths: must be 1 or more, got 0"),
        (["--benchmark", "nothing"], "unknown benchmark 'nothing'"),
        (["--data", "nowhere"], "no such folder: nowhere"),
        (["--out", "nowhere/fmd.json"], "--out nowhere/fmd.json: there is no folder "),
    ],
)
def test_wrong_input_is_told_before_the_model_is_loaded(fmd, arguments, message):
    code, out, err = fmd(*CALIBRATE, *arguments)
    assert code == 2 and out == "" and message in err and "Loading" not in err

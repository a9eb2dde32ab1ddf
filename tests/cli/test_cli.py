"""The command line, called in this process; one subprocess for the installed entry."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers.quantizers import quantizer_bnb_8bit

import fmd_ext
from fmd_ext.cli import main
from fmd_ext.cli.errors import UserError
from fmd_ext.config import FMDConfig
from fmd_ext.inputs.chat import prepare_inputs
from fmd_ext.inputs.media import load_clip
from fmd_ext.lab.cli import demo
from fmd_ext.lab.evidence.__main__ import demo_figures
from fmd_ext.lab.tiny import tiny_processor, write_clip
from fmd_ext.lab.trained import FIGURES, ROUTED, SETTINGS, bundled_scenes
from fmd_ext.torchvision_mend import torchvision_advice
from paths import ROOT

QUICK = ["--max-new-tokens", "6", "--max-frame-pixels", "3136"]


def test_ask_answers_as_the_model_does(fmd, folder):
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder / "model")
    inputs = prepare_inputs(tiny_processor(), load_clip(folder / "clip.mp4"), "What?", frame_pixels=(3136, 3136))
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = tiny_processor().decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    vanilla = fmd("ask", folder / "clip.mp4", "What?", "--vanilla", "--model", folder / "model", *QUICK)
    assert vanilla[:2] == (0, expected.lstrip() + "\n")
    assert "weights are random" in vanilla[2]
    # All layers forked or none: the model changes or does not.
    unforked = fmd("ask", folder / "clip.mp4", "What?", "--fork-layers", "0", "--model", folder / "model", *QUICK)
    assert unforked[:2] == vanilla[:2] and "nothing is forked" in unforked[2]
    forked = fmd("ask", folder / "clip.mp4", "What?", "--fork-layers", "4", "--model", folder / "model", *QUICK)
    assert forked[0] == 0 and forked[1] != vanilla[1]


@pytest.mark.parametrize("layout", ["--separate", "--interleaved"])
@pytest.mark.parametrize("masking", ["zero", "attention"])
def test_ask_compares(fmd, folder, layout, masking):
    random = ("--model", folder / "model")
    code, out, _ = fmd("ask", folder / "clip.mp4", "What?", "--compare", layout, "--masking", masking, *random, *QUICK)
    assert code == 0
    assert "fork-merge decoding: 1 of 4 layers forked, masking " + masking in out
    assert re.search(r"vanilla +┃ fork-merge decoding", out)
    assert len(re.findall(r"\d+ ms", out)) == 2
    assert ("alpha" in out) == (masking == "zero")  # it has no effect otherwise


def test_the_full_model_is_loaded_as_its_thinker(fmd, folder):
    code, out, err = fmd("ask", folder / "clip.mp4", "What?", "--model", folder / "full", "--dtype", "bfloat16", *QUICK)
    assert code == 0 and out.strip()
    assert "note: this model's weights are random: its words mean nothing" in err.splitlines()


@pytest.mark.parametrize("name, missing", [("silent", "audio"), ("blind", "video")])
def test_a_clip_that_lacks_a_part_is_answered_with_a_note(fmd, folder, name, missing):
    clip = folder / f"{name}.mp4"
    code, out, err = fmd("ask", clip, "What?", "--compare", "--interleaved", "--model", folder / "model", *QUICK)
    assert code == 0
    assert f"note: the clip has no {missing}, so nothing is forked" in err
    cells = re.search(r"┩\n│ (.*?) *│ (.*?) *│", out)
    assert cells[1] == cells[2] != ""


ASK = ("ask", "clip.mp4", "What?", "--model", "./model")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("ask", "nothing.mp4", "What?"), "no such file: nothing.mp4"),
        (("ask", ".", "What?"), ". is a folder, not a clip"),
        (("ask", "model/config.json", "What?"), "model/config.json is no media file"),
        (("ask", "clip.mp4", "  "), "the question is empty"),
        ((*ASK, "--alpha", "1.5"), "alpha must be in [0, 1], got 1.5"),
        ((*ASK, "--alpha", "nan"), "alpha must be in [0, 1], got nan"),
        ((*ASK, "--alpha", "visual=0.5"), "alpha must have exactly the keys"),
        ((*ASK, "--alpha", "much"), "argument --alpha: a number, visual=A,audio=B or auto, got 'much'"),
        ((*ASK, "--fork-layers", "-1"), "fork_layers must be 0 or more, got -1"),
        ((*ASK, "--fork-layers", "5"), "fork_layers=5 is out of range: the decoder has 4 layers"),
        ((*ASK, "--masking", "attention", "--mask-scale", "0.5"), "mask_scale=0.5 has no meaning"),
        ((*ASK, "--masking", "none"), "argument --masking: invalid choice: 'none'"),
        ((*ASK, "--vanilla", "--compare"), "not allowed with argument --vanilla"),
        ((*ASK, "--fps", "0"), "argument --fps: must be above 0, got 0"),
        ((*ASK, "--fps", "two"), "argument --fps: must be a number, got 'two'"),
        ((*ASK, "--text-weight", "half"), "argument --text-weight: a number, visual=A,audio=B or auto, got 'half'"),
        ((*ASK, "--max-frames", "0"), "argument --max-frames: must be 1 or more, got 0"),
        ((*ASK, "--max-frames", "many"), "argument --max-frames: must be a whole number, got 'many'"),
        ((*ASK, "--max-new-tokens", "40000"), "the model's limit is 32768"),
        ((*ASK, "--audio-track", "1"), "clip.mp4 has 1 sound tracks, counted from 0; there is no track 1"),
        ((*ASK, "--audio-track", "-1"), "argument --audio-track: must be 0 or more, got -1"),
        ((*ASK[:3], "--model", "./eight_bits"), "weights of ./eight_bits: Using `bitsandbytes` 8-bit quantization"),
        (("verify", "--model", "./eight_bits"), "weights of ./eight_bits: Using `bitsandbytes` 8-bit quantization"),
        (("verify", "--fork-layers", "7"), "fork_layers=7 is out of range: the decoder has 6 layers"),
        (("diagnose", *ASK[1:], "--fork-layers", "5"), "fork_layers=5 is out of range: the decoder has 4 layers"),
        (("diagnose", *ASK[1:], "--json", "."), ". is a folder, not a file to write"),
        (("diagnose", *ASK[1:], "--json", "no/facts.json"), "there is no folder no to write it in"),
        (("diagnose", *ASK[1:], "--plots", "clip.mp4"), "clip.mp4 is a file, not a folder to write in"),
        (("curves", "results", "--json", "no/curves.json"), "there is no folder no to write it in"),
        ((*ASK, "--device", "toaster"), "device 'toaster': accepted are auto, cpu, cuda, cuda:N, xpu, mps and spread"),
        ((*ASK, "--model", "./nowhere"), "model ./nowhere: there is no such folder"),
        ((*ASK, "--model", "./other"), "is of type 'llama'; supported types are qwen2_5_omni"),
        ((*ASK, "--model", "./bare"), "processor of ./bare: "),
        ((*ASK, "--model", "./weightless"), "weights of ./weightless: "),
        ((*ASK, "--model", "./holed"), "the weights of ./holed lack 1 tensors, among them lm_head.weight"),
        (("demo", "--seed", "-1"), "argument --seed: must be 0 to 999999, got -1"),
        (("demo", "--question", ""), "the question is empty"),
        (("sing",), "argument COMMAND: invalid choice: 'sing'"),
        ((), "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(fmd, folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    _write_broken_models(folder)
    monkeypatch.setattr(quantizer_bnb_8bit, "is_bitsandbytes_available", lambda *arguments: False)
    code, out, err = fmd(*arguments)
    assert code == 2 and out == ""
    lines = [line for line in err.splitlines() if line and not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith("fmd-ext") and ": error: " in lines[0]
    assert "the clip gives" not in err  # refused before it was read
    assert message in lines[0]


def _write_broken_models(folder: Path) -> None:
    """Of another type; with a configuration only; without weights; with a tensor missing; quantised."""
    if (folder / "other").exists():
        return
    for name in ("other", "bare", "weightless", "holed", "eight_bits"):
        (folder / name).mkdir()
    (folder / "other" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name in ("bare", "weightless", "holed"):
        (folder / name / "config.json").write_text((folder / "model" / "config.json").read_text())
    for name in ("weightless", "holed", "eight_bits"):
        tiny_processor().save_pretrained(folder / name)
    config = json.loads((folder / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "eight_bits" / "config.json").write_text(json.dumps(config))
    shutil.copy(folder / "model" / "model.safetensors", folder / "eight_bits")
    weights = load_file(folder / "model" / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("lm_head.weight"))]
    save_file(weights, folder / "holed" / "model.safetensors", metadata={"format": "pt"})


def test_without_torchvision_ask_says_what_to_install(fmd, folder, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else found(name))
    code, out, err = fmd("ask", folder / "clip.mp4", "What?", "--model", folder / "model")
    assert code == 2 and out == "" and torchvision_advice() in err


def test_the_version(fmd):
    assert fmd("--version")[:2] == (0, f"fmd_ext {fmd_ext.__version__}\n")


def test_debug_shows_where_an_error_comes_from(folder):
    with pytest.raises(UserError, match="no such file") as caught:
        main(["ask", str(folder / "nothing.mp4"), "What?", "--debug"])
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_cut_off_prompt_is_noted(fmd, tmp_path):
    long = write_clip(tmp_path / "long.mp4", seconds=9.0, width=16, height=16, picture=False)
    code, _, err = fmd("ask", long, "What?", "--vanilla", *QUICK)
    assert code == 0 and "note: the model hears only the first 8 s of 9.0 s" in err


def test_the_built_in_model_answers_about_a_bundled_clip(fmd):
    """Both objects are seen and heard: nothing misleads the model."""
    clip = next(path for path, scene in bundled_scenes().items() if scene.relation == "matched")
    kind = bundled_scenes()[clip].heard[0]
    for question, expected in (
        (f"Is the {kind} visible in the video?", "yes"),
        (f"Is the {kind} making sound in the audio?", "yes"),
    ):
        assert fmd("ask", clip, question, "--vanilla")[:2] == (0, f"{expected}\n")
    code, out, _ = fmd("ask", clip, f"Is the {kind} visible in the video?", "--compare")
    assert code == 0 and "of 6 layers forked" in out


def test_the_demo_shows_answers_of_three_methods_and_timings(fmd, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "demo.png"
    code, out, _ = fmd("demo", "--seed", "4", "--max-new-tokens", "3", "--fork-layers", "2", "--masking", "attention",
                       "--picture", str(picture))  # fmt: skip
    assert code == 0
    assert "built-in model, trained on synthetic clips" in out
    assert "FMD: 2 of 6 layers forked, masking attention, text weight 0.5" in out
    assert (
        "FMD routed: 2 of 6 layers forked, masking attention, text weight by the question (visual 0.8, audio 0.2)"
        in out
    )
    assert re.search(r"bundled clip \d+\.mp4: shows .*, sounds like .* \(swapped\)", out)
    assert "clip made on the spot (--seed 4): shows " in out
    counted = re.search(r"^right: vanilla (\d+) of (\d+), FMD (\d+) of (\d+), FMD routed (\d+) of (\d+)$", out, re.M)
    counts = [int(number) for number in counted.groups()]
    asked = counts[1]
    assert counts[1::2] == [asked] * 3 and out.count("(wrong)") == 3 * asked - sum(counts[::2])
    assert " ".join(demo.evidence().split()) in " ".join(out.split())
    assert len(re.findall(r"│ Is the \w+", out)) >= 6
    assert len(re.findall(r"│ +\d+ ms │ +[\d.]+ │ +3 │", out)) == 3
    assert picture.read_bytes().startswith(b"\x89PNG") and f"picture: {picture}" in out


def test_the_demo_says_what_the_evidence_page_says():
    """Its figures and settings are those of the record that the page is made of."""
    found = json.loads((ROOT / "docs" / "data" / "evidence.json").read_text())
    assert json.loads(FIGURES.read_text()) == demo_figures(found)
    settings, routed = FMDConfig.from_file(SETTINGS), FMDConfig.from_file(ROUTED)
    chosen = found["chosen"][settings.masking]["settings"]
    assert {name: getattr(settings, name) for name in chosen} == chosen
    row = next(row for row in found["rivals"]["methods"] if row["name"] == "FMD, routed")
    assert routed == FMDConfig(**row["settings"])


def test_the_demo_takes_a_question(fmd):
    code, out, _ = fmd("demo", "--seed", "4", "--question", "Describe what you see.", "--max-new-tokens", "2")
    assert code == 0 and out.count("Describe what") == 2 and "Is the" not in out
    assert "(wrong)" not in out and "right:" not in out  # what would be right is not known


def test_the_entry_point_runs_in_a_process_of_its_own():
    command = [sys.executable, "-m", "fmd_ext", "ask", "nothing.mp4", "What?"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "fmd-ext ask: error: no such file: nothing.mp4"
    assert "Traceback" not in result.stderr


def test_nothing_is_imported_that_is_not_needed():
    """--help takes no torch; patch, once there is a model, nothing but fmd_ext. Each import takes seconds."""
    code = (
        "import sys\nfrom fmd_ext.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    print({'torch', 'transformers'} & set(sys.modules))\n"
        "from transformers import Qwen2ForCausalLM\nQwen2ForCausalLM.__name__\nbefore = set(sys.modules)\n"
        "import fmd_ext\nfmd_ext.patch\nprint({name.split('.')[0] for name in set(sys.modules) - before})"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert said.stdout.splitlines()[-2:] == ["set()", "{'fmd_ext'}"]

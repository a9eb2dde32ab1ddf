"""The command that `fmd-ext serve` prints; vLLM is not needed for it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from fmd_ext.cli import main
from fmd_ext.config import FMDConfig
from fmd_ext.lab.trained import MODEL, SETTINGS
from fmd_ext.serve import environment
from fmd_ext.serve.folder import write_full_model


@pytest.fixture(autouse=True)
def _as_if_vllm_were_here(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "what_is_missing", lambda: None)
    monkeypatch.setattr(environment, "process_environment", dict)
    monkeypatch.setattr(environment, "server_command", lambda: ["vllm", "serve"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def printed(capsys):
    def run(*args):
        code = main(["serve", args[0], "--print-only", *args[1:]])
        out, err = capsys.readouterr()
        return code, shlex.split(out), err

    return run


def test_flags_of_a_full_model(printed, tmp_path):
    folder = write_full_model(MODEL, tmp_path / "full")
    code, words, _ = printed(str(folder), "--fork-layers", "2", "--alpha", "visual=0.9,audio=0.7", "--port", "8001")
    assert code == 0
    assert words[:3] == ["vllm", "serve", str(folder)] and words[-2:] == ["--port", "8001"]
    given = dict(zip(words[3:-2:2], words[4:-2:2], strict=True))
    assert json.loads(given["--hf-overrides"]) == {"architectures": ["FMDQwen2_5OmniForConditionalGeneration"]}
    settings = {"fork_layers": 2, "alpha": {"visual": 0.9, "audio": 0.7}}
    assert json.loads(given["--additional-config"]) == {"fork_merge_decoding": settings}
    size = {"shortest_edge": 9408, "longest_edge": 9408}  # of a processor made for small frames
    assert json.loads(given["--mm-processor-kwargs"]) == {"videos_kwargs": {"size": size}}


def test_a_thinker_is_written_out_once(printed):
    _, first, _ = printed(str(MODEL))
    _, second, _ = printed("built-in", "--", "--enforce-eager")
    assert first[2] == second[2] != str(MODEL) and second[-1] == "--enforce-eager"
    config = json.loads((Path(first[2]) / "config.json").read_text())
    assert config["model_type"] == "qwen2_5_omni"
    alpha = FMDConfig.from_file(SETTINGS).alpha
    assert f'"alpha": {alpha}' in " ".join(second), "the built-in model comes with settings of its own"
    assert second[second.index("--kv-cache-memory-bytes") + 1] == "268435456" and "--kv-cache-memory-bytes" not in first


def test_a_flag_of_the_user_replaces_the_commands(printed):
    _, words, _ = printed("built-in", "--kv-cache-memory-bytes", "4096", "--served-model-name", "small")
    assert words[-4:] == ["--kv-cache-memory-bytes", "4096", "--served-model-name", "small"]
    assert words.count("--kv-cache-memory-bytes") == words.count("--served-model-name") == 1


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("/tmp/no-such-model",), "model /tmp/no-such-model: there is no such folder"),
        (("built-in", "--hf-overrides", "{}"), "--hf-overrides is written by this command"),
        (("built-in", "--additional-config={}"), "--additional-config is written by this command"),
        (("built-in", "--model", "another"), "--model is written by this command"),
        (("built-in", "--alpha", "2"), "alpha must be in [0, 1], got 2.0"),
        (("built-in", "--alpha", "auto"), "alpha='auto' is chosen per prompt and cannot be served; give a number"),
        (("built-in", "--masking", "attention"), "masking='attention' cannot be served"),
        (("built-in", "--fork-layers", "7"), "fork_layers=7 is out of range: the decoder has 6 layers"),
    ],
)
def test_wrong_input_is_one_line(printed, args, says):
    code, words, err = printed(*args)
    assert code == 2 and words == [] and says in err and err.count("\n") == 1


def test_a_model_that_is_not_served_is_named(printed, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    code, _, err = printed(str(tmp_path))
    assert code == 2 and "is a LlamaForCausalLM; fork-merge decoding serves Qwen2_5Omni" in err


def test_other_commands_still_refuse_what_they_do_not_know(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--port", "8001"])
    assert "unrecognized arguments: --port 8001" in capsys.readouterr().err

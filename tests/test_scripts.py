"""The scripts that need what is not at hand here, with a stand-in for Python: `scripts/gpu`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest

from paths import ROOT

# The runner's tests hang, one benchmark fails, one test run finds no test, the rest does what it is asked for.
PYTHON = """#!/bin/bash
echo "$*" >>calls.txt
case "$*" in
  "-c from fmd_ext"*) exit {built} ;;
  *"pytest"*"tests/decode --ign"* | *"--ignore"*) exit 5 ;;
  *"pytest"*"tests/decode"*) sleep 100 ;;
  *"bench"*"append_"*) echo wrong output; exit 1 ;;
  *"bench"*) while [[ $1 != --json ]]; do shift; done; echo '{{"cases": ["x"]}}' >"$2" ;;
esac
"""


@pytest.fixture
def gpu(tmp_path):
    """Runs scripts/gpu in a tree of its own; gives what it said, and the tree."""

    def run(*arguments, built=True, **variables):
        shutil.copytree(ROOT / "scripts", tmp_path / "scripts", dirs_exist_ok=True)
        (tmp_path / "fmd_ext" / "lib").mkdir(parents=True, exist_ok=True)
        (tmp_path / "fmd_ext" / "lib" / "libfmd_ext_cuda.so").touch()
        python = tmp_path / "python"
        python.write_text(PYTHON.format(built=int(not built)))
        python.chmod(0o755)
        environment = os.environ | {"FMD_EXT_PYTHON": str(python), "FMD_EXT_GPU_LIMIT": "1", **variables}
        command = [tmp_path / "scripts" / "gpu", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300), tmp_path

    return run


def test_a_part_that_hangs_or_fails_costs_only_itself(gpu):
    said, tree = gpu("out")
    parts = [json.loads(line) for line in (tree / "out" / "parts.jsonl").read_text().splitlines()]
    outcomes = {part["part"]: part["outcome"] for part in parts}
    assert outcomes.pop("tests_runner") == "timed out" and outcomes.pop("bench_rows") == "failed"
    assert outcomes.pop("tests_others") == "no test"
    assert set(outcomes.values()) == {"passed"} and {"doctor", "tests_ops", "bench_model_generate"} <= set(outcomes)
    assert said.returncode == 2 and "tests_runner: timed out, see out/tests_runner.txt" in said.stderr
    assert list(outcomes)[:2] == ["doctor", "tests_ops"]
    assert (tree / "out" / "bench_rows.txt").read_text() == "wrong output\n"
    assert json.loads((tree / "out" / "bench_prefill.json").read_text()) == {"cases": ["x"]}


def test_a_built_tree_builds_and_installs_nothing(gpu):
    said, tree = gpu("out")
    assert "nothing is built" in said.stdout
    calls = (tree / "calls.txt").read_text()
    assert "pip" not in calls.split() and "setup.py" not in calls


def test_another_tree_is_built_in_place(gpu):
    said, tree = gpu("out", built=False)
    assert "setup.py --quiet build_ext --inplace" in (tree / "calls.txt").read_text()

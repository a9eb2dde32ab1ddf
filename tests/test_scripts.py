"""The scripts of the README: what they say while they install."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from fmd_ext.lab.bench import memory
from fmd_ext.lab.bench.__main__ import OPS
from paths import ROOT

TALKATIVE = """#!/bin/sh
if [ "$1 $2" = "-m pip" ]; then
  for line in $(seq 170); do echo "pip's line $line"; done
  exit {status}
fi
exec {python} "$@"
"""


@pytest.mark.parametrize("status", [0, 1])
def test_what_pip_says_is_shown_only_where_it_fails(tmp_path, status):
    """With an interpreter in place of the environment's whose pip talks and installs nothing."""
    (tmp_path / "bin").mkdir()
    for name in ("pip", "python"):
        (tmp_path / "bin" / name).write_text(TALKATIVE.format(status=status, python=sys.executable))
        (tmp_path / "bin" / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", 'source scripts/environment.sh; make_environment "[omni]"; echo ready'],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "FMD_EXT_VENV": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    talk = [line for line in done.stderr.splitlines() if line.startswith("pip's line")]
    assert "pip's line" not in done.stdout
    if status:
        assert done.returncode == 1 and len(talk) == 170 and "ready" not in done.stdout
        assert done.stderr.splitlines()[-1].endswith("failed, as told above")
    else:
        assert done.returncode == 0 and talk == [] and len(done.stdout.splitlines()) < 10
        assert f"the command line is {tmp_path}/bin/fmd-ext" in done.stdout


def test_the_gpu_script_measures_all_that_there_is():
    """`fmd_ext.lab.bench --only` takes these names and no other."""
    parts = re.findall(r"(?m)^bench \w+ \d+ (.+)$", (ROOT / "scripts" / "gpu").read_text())
    assert sorted(" ".join(parts).split()) == sorted((*OPS, memory.NAME))

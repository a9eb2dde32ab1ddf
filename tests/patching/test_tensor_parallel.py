"""Transformers' tensor parallelism with a patched model: two processes on the CPU equal one."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from fmd_ext.lab.tiny import save_random_model
from paths import TESTS

SCRIPT = TESTS / "support" / "two_ranks.py"


def run(*command):
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(SCRIPT.parent)]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    said = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600)
    assert said.returncode == 0, said.stderr[-3000:]


def test_two_ranks_equal_one_process(tmp_path):
    folder = save_random_model(tmp_path / "model")
    run(str(SCRIPT), str(folder), str(tmp_path / "out"))
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT), folder, tmp_path / "out")
    expected = torch.load(tmp_path / "out.None")
    assert not expected["split"]
    for rank in range(2):
        found = torch.load(tmp_path / f"out.{rank}")
        assert found["split"], "the weights were not split"
        for name in ("logits", "plain"):
            torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=0)
        assert torch.equal(found["tokens"], expected["tokens"])
    assert (expected["logits"] - expected["plain"]).abs().max() > 0.1, "nothing was forked"

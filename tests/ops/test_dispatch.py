"""Which code runs an op: the rule as a table, the one warning, and the check before a kernel's first use."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import subprocess
import sys

import pytest
import torch

from attention_cases import Group, assert_as_exact, expected, make_case
from fmd_ext import ops
from fmd_ext.ops import dispatch, library, selftest
from fmd_ext.ops.dispatch import Facts, Path, decide
from fmd_ext.ops.registration import operators

FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
H200 = Facts("cuda", BFLOAT16, 128, capability=(9, 0))
TABLE = [
    (Facts("cpu", FLOAT32, 64), "kernel", ""),
    (Facts("cpu", BFLOAT16, 8), "kernel", ""),
    (Facts("cpu", FLOAT64, 64), "torch", "the kernels for cpu take float32, bfloat16 and float16, not float64"),
    (Facts("cpu", FLOAT32, 12), "torch", "the kernels for cpu take a head_dim that is a multiple of 8, not 12"),
    (Facts("cpu", FLOAT32, None, attention=False), "kernel", ""),
    (Facts("cpu", FLOAT32, 64, missing="no compiler"), "torch", "no compiler"),
    (H200, "kernel", ""),
    (dataclasses.replace(H200, dtype=FLOAT16, head_dim=64), "kernel", ""),
    (
        dataclasses.replace(H200, dtype=FLOAT32),
        "torch",
        "the attention kernels for cuda take bfloat16 and float16, not",
    ),
    (dataclasses.replace(H200, dtype=FLOAT32, attention=False), "kernel", ""),
    (dataclasses.replace(H200, dtype=FLOAT64, attention=False), "torch", "the kernels for cuda take float32, bfloat16"),
    (
        dataclasses.replace(H200, missing="built without the CUDA op library"),
        "torch",
        "built without the CUDA op library",
    ),
    *(
        (dataclasses.replace(H200, head_dim=size), "torch", f"take head_dim 64 and 128, not {size}")
        for size in (80, 96, 256)
    ),
    *(
        (dataclasses.replace(H200, capability=capability), "kernel", f"compute capability {text}")
        for capability, text in (
            ((8, 0), "8.0"),
            ((8, 6), "8.6"),
            ((8, 9), "8.9"),
            ((10, 0), "10.0"),
            ((12, 0), "12.0"),
        )
    ),
    (
        dataclasses.replace(H200, capability=(7, 5)),
        "torch",
        "the kernels need compute capability 8.0, this GPU has 7.5",
    ),
    (Facts("cuda", BFLOAT16, 128, hip="6.4"), "torch", "fmd_ext has no kernels for ROCm (6.4)"),
    (Facts("mps", FLOAT16, 128), "torch", "fmd_ext has no kernels for mps"),
    (Facts("xpu", BFLOAT16, 128, missing="never asked"), "torch", "fmd_ext has no kernels for xpu"),
]


@pytest.mark.parametrize("facts,name,why", TABLE, ids=str)
def test_the_rule(facts, name, why):
    path = decide(facts)
    assert path.name == name and why in path.why and bool(path.why) == bool(why)
    assert path.unchecked == (name == "kernel" and facts.device == "cuda" and facts.capability != (9, 0))


@pytest.fixture
def forgotten(monkeypatch):
    """As in a process in which no op has run."""
    monkeypatch.setattr(dispatch, "_found", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    dispatch._check.cache_clear()
    yield
    dispatch._check.cache_clear()


def test_one_warning_per_reason(forgotten, caplog):
    case = make_case([Group(3, 5)], (2, 1), 12, FLOAT32)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            out, _ = ops.branched_prefill(*case.prefill_args())
    assert_as_exact(out, expected(case, FLOAT32)[0], expected(case)[0], FLOAT32)
    [record] = caplog.records
    assert record.getMessage() == (
        "fmd_ext: on cpu torch's own operations run in the place of fmd_ext's kernels, exact but slower: the kernels "
        "for cpu take a head_dim that is a multiple of 8, not 12"
    )


class TestACapabilityThatNoTestRanOn:
    @pytest.fixture(autouse=True)
    def _unchecked(self, forgotten, monkeypatch):
        """The CPU in the place of a GPU of compute capability 8.6."""
        facts = dataclasses.replace(H200, capability=(8, 6))
        monkeypatch.setattr(dispatch, "_facts", lambda *key: facts)

    def found(self):
        return dispatch.find(torch.device("cpu"), BFLOAT16, 128, attention=True)

    def test_kernels_that_pass_the_check_run(self):
        assert self.found() == Path("kernel", "checked here, since no test has run on compute capability 8.6", True)

    @pytest.mark.parametrize("op", ["append_", "rope_append_", "merge_"])
    def test_kernels_that_fail_it_do_not(self, monkeypatch, caplog, op):
        monkeypatch.setattr(operators()[op], "kernel", lambda *arguments: None)
        with caplog.at_level(logging.WARNING):
            path = self.found()
        assert path.name == "torch"
        assert re.match(rf"the check of the kernels failed on this GPU \({op} of bfloat16 gives a wrong", path.why)
        assert [path.why in record.getMessage() for record in caplog.records] == [True]

    def test_a_launch_that_is_refused_counts_as_failed(self, monkeypatch):
        def refused(*arguments):
            raise RuntimeError("no kernel image is available for execution on the device")

        monkeypatch.setattr(operators()["branched_decode"], "kernel", refused)
        path = self.found()
        assert path.name == "torch" and "no kernel image is available" in path.why

    def test_the_check_runs_once(self, monkeypatch):
        runs = []
        monkeypatch.setattr(selftest, "problems", lambda device: runs.append(device) or [])
        for head_dim in (64, 128):
            dispatch.find(torch.device("cpu"), BFLOAT16, head_dim, attention=True)
        assert len(runs) == 1


def test_what_is_chosen_holds_within_its_context():
    case = make_case([Group(1, 1)], (2, 1), 12, FLOAT32)
    with (
        dispatch.selected("kernel"),
        pytest.raises(ValueError, match="q has head_dim 12, accepted are the positive mult"),
    ):
        ops.branched_prefill(*case.prefill_args())
    with dispatch.selected("torch"):
        assert dispatch.find(torch.device("cpu"), FLOAT32, 64, attention=True).why == "torch's path was chosen"
    assert dispatch.find(torch.device("cpu"), FLOAT32, 64, attention=True) == Path("kernel", "")


def test_unknown_choice():
    with pytest.raises(ValueError, match=r"^unknown path of the ops 'gpu'; accepted: auto, kernel, torch$"):
        dispatch.select("gpu")
    said = subprocess.run(
        [sys.executable, "-c", "import fmd_ext.ops.dispatch"],
        env=os.environ | {"FMD_EXT_OPS": "gpu"},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 1
    assert said.stderr.splitlines()[-1].endswith(
        "FMD_EXT_OPS: unknown path of the ops 'gpu'; accepted: auto, kernel, torch"
    )


class TestSplit:
    """How branched_decode splits keys: told to the kernel with every call."""

    @pytest.fixture
    def told(self, monkeypatch):
        """What the kernel was told in each call of the op."""
        seen = []
        op = operators()["branched_decode"]
        run = op.kernel
        monkeypatch.setattr(op, "kernel", lambda *arguments: seen.append(arguments[-1]) or run(*arguments))
        return seen

    def test_it_is_fixed_where_it_is_asked_for(self, told):
        arguments = make_case([Group(1, 40)], (2, 1), 64, FLOAT32).decode_args()
        ops.branched_decode(*arguments)
        ops.branched_decode(*arguments, fixed_split=True)
        dispatch.select_split("fixed")
        try:
            ops.branched_decode(*arguments)
            ops.branched_decode(*arguments, fixed_split=False)
        finally:
            dispatch.select_split("auto")
        assert told == [False, True, True, False]

    def test_torchs_deterministic_algorithms_fix_it(self, told):
        arguments = make_case([Group(1, 40)], (2, 1), 64, FLOAT32).decode_args()
        torch.use_deterministic_algorithms(True)
        try:
            ops.branched_decode(*arguments)
        finally:
            torch.use_deterministic_algorithms(False)
        ops.branched_decode(*arguments)
        assert told == [True, False]

    def test_unknown_split(self):
        with pytest.raises(ValueError, match=r"^unknown split of decoding 'even'; accepted: auto, fixed$"):
            dispatch.select_split("even")
        environment = os.environ | {"FMD_EXT_DECODE_SPLIT": "even"}
        command = [sys.executable, "-c", "import fmd_ext.ops.dispatch"]
        said = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert said.returncode == 1 and "FMD_EXT_DECODE_SPLIT: unknown split of decoding 'even'" in said.stderr


# A program in an installation whose build could compile nothing: no op library, no planner module.
UNCOMPILED = """
import logging, pathlib, sys, torch
logging.basicConfig(format="%(message)s")
import fmd_ext
from fmd_ext.ops import library
library._BUILD_INFO = pathlib.Path(sys.argv[1])
library._FOLDER = library._BUILD_INFO.parent
sys.modules["fmd_ext._core"] = None
from fmd_ext import ops
from fmd_ext.engine.reference import reference_logits
from fmd_ext.lab.tiny import tiny_thinker
from omni_inputs import AUDIO_VIDEO, TEXT_ONLY, build_inputs
torch.set_grad_enabled(False)
model, inputs = tiny_thinker(seed=0), build_inputs([AUDIO_VIDEO, TEXT_ONLY])
config = fmd_ext.FMDConfig(fork_layers=2, masking="zero").resolve(fmd_ext.FMDConfig(), 4)
keep = inputs["attention_mask"].bool()
want = reference_logits(model, config, **inputs)[keep]
handle = fmd_ext.patch(model, config)
print((model(**inputs).logits[keep] - want).abs().max().item() < 1e-4)
print(handle.attention_runs_on)
print({lib.loaded for lib in library.load().values()}, library.cpu_isa(), library.cpu_isas())
"""


def test_an_installation_without_compiled_code(tmp_path):
    info = tmp_path / "_build_info.json"
    info.write_text('{"compiled": false, "reason": "no C++ compiler found"}')
    path = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", UNCOMPILED, info]
    said = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    why = "this installation has no compiled code: no C++ compiler found"
    assert said.stdout.splitlines() == ["True", f"torch: {why}", "{False} None []"]
    assert said.stderr.count(why) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"compiled": false}'])
def test_damaged_facts_of_the_build(tmp_path, monkeypatch, text):
    info = tmp_path / "_build_info.json"
    info.write_text(text)
    monkeypatch.setattr(library, "_BUILD_INFO", info)
    with pytest.raises(ImportError, match=f"{re.escape(str(info))} is damaged .*: install fmd_ext again"):
        library.why_not_compiled()

"""``fmd-ext doctor``: what it tells, and that what is wrong ends it with 1."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fmd_ext
from fmd_ext import ops
from fmd_ext.cli import doctor
from fmd_ext.cli.forked_call import forked_call
from fmd_ext.ops import library
from fmd_ext.ops.registration import operators
from fmd_ext.torchvision_mend import torchvision_advice


def test_doctor_reports_json(fmd):
    code, out, err = fmd("doctor", "--json")
    report = json.loads(out)
    assert (code, err, report["problems"]) == (0, "", [])
    assert report["versions"]["torch"] == torch.__version__ and report["versions"]["python"]
    assert report["cpu"]["threads"] == torch.get_num_threads()
    libraries = {library["device"]: library for library in report["libraries"]}
    assert libraries["cpu"]["loaded"] and Path(libraries["cpu"]["path"]).is_file()
    on_cpu = {op["op"]: op for op in report["ops"] if op["device"] == "cpu"}
    assert set(on_cpu) == set(ops.__all__)
    assert library.cpu_isa() in on_cpu["branched_prefill"]["path"]
    assert all(op["check"].keys() == {"float32", "bfloat16", "float16"} and op["why"] for op in on_cpu.values())
    assert all(float(op["check"]["float32"]) < 1e-5 for op in on_cpu.values())
    for op in report["ops"]:
        assert op["path"] is not None or op["why"]
    calls = {call["masking"]: call for call in report["forked_calls"] if call["device"] == "cpu"}
    assert set(calls) == {"zero", "attention"}
    for call in calls.values():
        assert call["is_right"] and call["error"] <= call["allowed"] < 1e-3 < call["effect"]
        assert len(call["shortfalls"]) == 2 and max(call["shortfalls"]) < 1e-3
        assert call["fusions"]["norms"] == "on in 9 modules" and "fusions=True" in call["fusions"]["qkv"]
    on_gpu = torch.cuda.is_available() and libraries["cuda"]["loaded"]
    assert report["decode_runner"]["on_by_default"]
    assert ("a GPU, by CUDA graphs" in report["decode_runner"]["why"]) == on_gpu


def test_doctor_in_words(fmd):
    code, out, _ = fmd("doctor")
    assert code == 0 and out.splitlines()[-1] == "all is well: forked calls run here, and equal two plain passes"
    for word in (
        "transformers",
        "libfmd_ext_cpu.so",
        "branched_decode (cpu)",
        "torch_target_version",
        "forked calls",
        "gate_up (cpu)",
        "decode runner",
    ):
        assert word in out


def test_doctor_fails_when_the_ops_do_not_load(fmd, monkeypatch):
    def broken():
        raise ImportError("the op library lib.so\ndoes not load")

    monkeypatch.setattr(library, "load", broken)
    code, out, _ = fmd("doctor")
    assert code == 1 and "problem: the op library lib.so does not load" in out


def test_doctor_fails_when_an_op_is_wrong(fmd, monkeypatch):
    monkeypatch.setattr(operators()["merge_"], "kernel", lambda *arguments: None)
    code, out, _ = fmd("doctor")
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    assert code == 1 and problems and all("merge_" in line and "gives a wrong result" in line for line in problems)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_forked_call_in_low_precision(dtype):
    """As on a GPU."""
    for masking in ("zero", "attention"):
        assert forked_call(masking, torch.device("cpu"), dtype).is_right


@pytest.mark.parametrize("masking", ["zero", "attention"])
def test_doctor_fails_when_forked_calls_are_wrong(fmd, monkeypatch, masking):
    """The ops are well, and the patched model merges by other weights than it was told."""
    from fmd_ext.config import FMDConfig

    weights = FMDConfig.merge_weights.fget
    monkeypatch.setattr(FMDConfig, "merge_weights", property(lambda self: tuple(0.9 * w for w in weights(self))))
    monkeypatch.setattr("fmd_ext.cli.forked_call.reference_hidden", _with_right_weights(weights))
    code, out, _ = fmd("doctor")
    assert code == 1 and f"problem: a forked call on cpu, masking {masking}, gives a wrong result: logits off by" in out
    assert "all is well" not in out


def _with_right_weights(weights):
    from fmd_ext.config import FMDConfig
    from fmd_ext.engine.reference import reference_hidden

    def hidden(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FMDConfig, "merge_weights", property(weights))
            return reference_hidden(*arguments)

    return hidden


def test_doctor_fails_when_a_forked_call_raises(fmd, monkeypatch):
    def broken(*arguments):
        raise TypeError("forward() got an\nunexpected keyword argument")

    monkeypatch.setattr("fmd_ext.cli.forked_call.forked_call", broken)
    code, out, err = fmd("doctor")
    assert code == 1 and err == ""
    assert "a forked call on cpu, masking zero, fails: TypeError: forward() got an unexpected keyword argument" in out


def test_doctor_says_that_transformers_is_too_old(fmd, monkeypatch):
    found = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.57.1" if name == "transformers" else found(name))
    code, out, err = fmd("doctor")
    assert code == 1 and err == "" and out.count("4.57.1 is installed: upgrade it") == 1
    assert "not tried  see the problems below" in out


def test_doctor_where_transformers_lacks_what_we_import(tmp_path):
    """An import that fails, of whatever name, is one line."""
    (tmp_path / "transformers.py").write_text("__version__ = '5.20.0'\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "fmd_ext", "doctor"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert said.returncode == 1 and "Traceback" not in said.stderr
    [problem] = [line for line in said.stdout.splitlines() if line.startswith("problem: ")]
    assert problem.startswith("problem: forked calls cannot run here: ImportError: ")


class TestBuild:
    """How the compiled parts fit what is here."""

    facts = {"torch_version": "2.13.0", "torch_target_version": "0x020a000000000000", "cuda_compiler": "13.0.88"}

    @pytest.mark.parametrize("torch_, cuda", [("2.10.0", "13.0"), ("2.15.0+cu132", "13.2"), ("2.13.0+cpu", None)])
    def test_within_the_promise(self, torch_, cuda):
        assert doctor._misfits(self.facts, torch_, cuda) == []

    def test_an_older_torch(self):
        [said] = doctor._misfits(self.facts, "2.9.1", None)
        assert "built against torch 2.13.0, run in torch 2.10 and later, and 2.9.1 is installed" in said

    def test_an_older_cuda(self):
        [said] = doctor._misfits(self.facts, "2.10.0+cu128", "12.8")
        assert "compiled by CUDA 13.0.88, the installed torch is for CUDA 12.8" in said

    @pytest.fixture
    def tree(self, tmp_path, monkeypatch):
        """Sources, and libraries that are newer."""
        for name in ("csrc/plan.cpp", "csrc/cuda/merge.cu", "fmd_ext/lib/libfmd_ext_cpu.so", "fmd_ext/_core.x.so"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
            os.utime(tmp_path / name, (1000, 2000 if name.endswith(".so") else 1000))
        monkeypatch.setattr(doctor, "SOURCES", tmp_path)
        return tmp_path

    def test_an_edited_source(self, tree):
        assert doctor._changed_since_built({"cuda": True}) == ""
        os.utime(tree / "csrc" / "plan.cpp", (3000, 3000))
        assert doctor._changed_since_built({"cuda": False}) == "csrc/plan.cpp"
        os.utime(tree / "fmd_ext" / "_core.x.so", (4000, 4000))  # it alone was linked again
        assert doctor._changed_since_built({"cuda": False}) == ""

    def test_an_edited_kernel_that_was_not_built(self, tree):
        os.utime(tree / "csrc" / "cuda" / "merge.cu", (3000, 3000))
        assert doctor._changed_since_built({"cuda": False}) == ""
        assert doctor._changed_since_built({"cuda": True}) == "csrc/cuda/merge.cu"

    def test_an_installation_without_sources(self, tree):
        os.utime(tree / "csrc" / "plan.cpp", (3000, 3000))
        (tree / "csrc").rename(tree / "elsewhere")
        assert doctor._changed_since_built({"cuda": True}) == ""

    def test_nothing_compiled_is_no_problem(self, tmp_path, monkeypatch):
        info = tmp_path / "_build_info.json"
        info.write_text('{"compiled": false, "reason": "no C++ compiler was found"}')
        monkeypatch.setattr(library, "_BUILD_INFO", info)
        monkeypatch.setitem(sys.modules, "fmd_ext._core", None)  # as where it is not
        monkeypatch.delattr(fmd_ext, "_core", raising=False)
        report = {"problems": [], "warnings": []}
        reason = "this installation has no compiled code: no C++ compiler was found"
        assert doctor._build(report) == {"compiled": False, "reason": reason}
        assert report["problems"] == [] and "no C++ compiler was found; with one, pip install" in report["warnings"][0]
        info.write_text("{")
        assert doctor._build(report) is None and "install fmd_ext again" in report["problems"][0]
        info.unlink()
        assert doctor._build(report) is None and len(report["problems"]) == 2


@pytest.mark.parametrize(
    "installed,wanted", [("2.10.0", "==0.25.*"), ("2.13.0+cpu", "==0.28.*"), ("2.14.1", ">=0.29"), ("2.15.0", ">=0.29")]
)
def test_the_torchvision_of_the_installed_torch_is_advised(monkeypatch, installed, wanted):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
    assert torchvision_advice() == f"pip install --no-deps 'torchvision{wanted}'"


def test_a_driver_that_torch_makes_nothing_of(monkeypatch):
    report = {"warnings": [], "gpus": []}
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    driver = Path(__file__)  # any file that is there
    doctor._driver(report, driver)
    assert (
        len(report["warnings"]) == 1 and "built for CUDA 13.2, which may need a newer driver" in report["warnings"][0]
    )
    doctor._driver(report, driver / "absent")
    monkeypatch.setattr(torch.version, "cuda", None)
    doctor._driver(report, driver)
    assert len(report["warnings"]) == 1

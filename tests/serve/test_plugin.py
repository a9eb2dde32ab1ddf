"""The plugin's registration, and that it costs nothing to those who do not use it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest

import fmd_ext
from fmd_ext.serve import ARCHITECTURES, environment
from paths import ROOT


def test_the_entry_point_is_the_function():
    project = (ROOT / "pyproject.toml").read_text()
    assert f'[project.entry-points."{environment.PLUGINS}"]\nfmd_ext = "fmd_ext.serve:register"\n' in project


def test_importing_it_imports_neither_vllm_nor_transformers_nor_the_lab():
    code = (
        "import sys, fmd_ext.serve, fmd_ext.serve.settings, fmd_ext.serve.tokens\n"
        "heavy = {name.partition('.')[0] for name in sys.modules} & {'vllm', 'transformers', 'torchvision'}\n"
        "print(sorted(heavy), [name for name in sys.modules if name.startswith('fmd_ext.lab')])"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[] []"


def test_serve_names_no_module_of_the_lab():
    files = list((ROOT / "fmd_ext" / "serve").rglob("*.py"))
    assert len(files) > 5
    for file in files:
        assert not re.search(r"fmd_ext[./]lab|from \.+lab", file.read_text()), file


def test_registered_twice_in_vllm_and_classes_are_not_loaded():
    pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test-serve makes an environment with it")
    code = (
        "import sys\n"
        "from vllm.model_executor.models.registry import ModelRegistry\n"
        "plain = dict(ModelRegistry.models)\n"
        "from fmd_ext.serve import register\n"
        "register(); register()\n"
        "print({k: v for k, v in ModelRegistry.models.items() if k in plain} == plain)\n"
        "print(sorted(set(ModelRegistry.models) - set(plain)))\n"
        "print([name for name in sys.modules if name.startswith('fmd_ext.serve.qwen')])"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names = sorted(name for name, _ in ARCHITECTURES.values())
    assert said.stdout.splitlines()[-3:] == ["True", str(names), "[]"]


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(environment, "vllm_version", lambda: None)
    assert "vLLM is not installed" in environment.what_is_missing()
    report = {"warnings": []}
    environment.examine(report)
    assert report["serving"]["starts"] is None and report["warnings"] == []

    monkeypatch.setattr(environment, "vllm_version", lambda: "0.32.0")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    assert "runs from its sources here" in environment.what_is_missing()

    plugin = importlib.metadata.EntryPoint("fmd_ext", "fmd_ext.serve:register", environment.PLUGINS)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [plugin])
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    assert environment.what_is_missing() == "VLLM_PLUGINS=another leaves out the plugin fmd_ext"
    monkeypatch.delenv("VLLM_PLUGINS")
    assert environment.what_is_missing() is None


def test_doctor_tells_why_vllm_does_not_start(monkeypatch):
    monkeypatch.setattr(environment, "vllm_version", lambda: "0.31.2")
    monkeypatch.setattr(environment, "what_is_missing", lambda: None)
    monkeypatch.setattr(environment, "_TRY", "raise ImportError('no such library')")
    report = {"warnings": []}
    environment.examine(report)
    assert report["serving"]["starts"] is False
    assert environment.in_words(report["serving"]) == "0.31.2, cannot serve: ImportError: no such library"
    assert "0.31.2 is not the one that serving was tested with" in report["warnings"][0]
    assert "no such library" in report["warnings"][1]


def test_torchvision_is_mended_in_processes_that_vllm_starts():
    """vLLM's processes import torchvision long before they load a plugin; theirs is mended by a file on PYTHONPATH."""
    assert (environment._STARTUP / "sitecustomize.py").is_file()
    added = environment.process_environment()
    if not added:
        pytest.skip("torchvision is not there, or its own ops load beside this torch")
    package = os.path.dirname(os.path.dirname(fmd_ext.__file__))
    mended = os.pathsep.join([str(environment._STARTUP), package])
    assert added["PYTHONPATH"].split(os.pathsep)[0] == str(environment._STARTUP)
    for path, works in ((mended, True), (package, False)):
        run = [sys.executable, "-c", "import torchvision"]
        said = subprocess.run(run, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
        assert (said.returncode == 0) == works, said.stderr

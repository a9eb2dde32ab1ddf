"""Loading of the op libraries, and the choice of the instruction set of the CPU kernels."""

from __future__ import annotations

import importlib
import re
import types

import pytest
import torch

from fmd_ext.ops import library


@pytest.fixture
def before_load(monkeypatch):
    """As in a process that has not loaded the libraries yet."""
    previous = library.cpu_isa()
    monkeypatch.setattr(library, "_libraries", {})
    yield
    library.select_cpu_isa(previous)


def test_what_was_loaded():
    libraries = library.load()
    assert libraries["cpu"].loaded and libraries["cpu"].path.exists()
    cuda = libraries["cuda"]
    assert cuda.loaded != bool(cuda.reason)
    assert library.load() == libraries


def test_baseline_is_always_there_and_the_best_is_the_default():
    isas = library.cpu_isas()
    assert isas[0] == "baseline" and set(isas) <= {"baseline", "avx2", "avx512"}
    library.select_cpu_isa("auto")
    assert library.cpu_isa() == isas[-1]


@pytest.mark.parametrize("name", library.cpu_isas())
def test_environment_chooses(name, before_load, monkeypatch):
    monkeypatch.setenv("FMD_EXT_CPU_ISA", name)
    library.load()
    assert library.cpu_isa() == name


@pytest.mark.parametrize("name", ["", "auto"])
def test_environment_leaves_the_choice(name, before_load, monkeypatch):
    library.select_cpu_isa("baseline")
    monkeypatch.setenv("FMD_EXT_CPU_ISA", name)
    library.load()
    assert library.cpu_isa() == library.cpu_isas()[-1]


def test_unknown_name(before_load, monkeypatch):
    message = "unknown CPU instruction set 'sse9'; accepted: auto, baseline, avx2, avx512"
    with pytest.raises(ValueError, match=f"^{message}$"):
        library.select_cpu_isa("sse9")
    monkeypatch.setenv("FMD_EXT_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match=f"^environment variable FMD_EXT_CPU_ISA: {message}$"):
        library.load()


def test_name_that_this_machine_cannot_run():
    missing = {"avx2", "avx512"} - set(library.cpu_isas())
    before = library.cpu_isa()
    for name in missing:
        with pytest.raises(ValueError, match=f"instruction set '{name}'; accepted: baseline"):
            library.select_cpu_isa(name)
    assert library.cpu_isa() == before


@pytest.fixture
def empty_folder(before_load, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    return tmp_path


def test_missing_library(empty_folder):
    path = re.escape(str(empty_folder / "libfmd_ext_cpu.so"))
    with pytest.raises(ImportError, match=f"{path} does not exist: fmd_ext is not built here. Install it with"):
        library.load()


def test_library_that_does_not_load(empty_folder):
    (empty_folder / "libfmd_ext_cpu.so").write_bytes(b"no library")
    version = re.escape(torch.__version__)
    with pytest.raises(ImportError, match=rf"does not load into torch {version} \(2.10 or newer is needed\): "):
        library.load()


def test_a_library_of_another_schema_version_is_refused(before_load, monkeypatch):
    newer = library.SCHEMA_VERSION + 1
    monkeypatch.setattr(library, "SCHEMA_VERSION", newer)
    with pytest.raises(ImportError, match=rf"its op schemas are version {newer - 1}, .* has version {newer}\): build"):
        library.load()


def test_a_library_of_other_sources_is_named(monkeypatch):
    monkeypatch.setattr(torch.ops, "fmd_ext", types.SimpleNamespace())
    with pytest.raises(ImportError, match=r"libfmd_ext_cpu\.so was built from other sources .* build it again"):
        importlib.reload(importlib.import_module("fmd_ext.ops.merge"))


def test_the_former_variable_of_a_kernel_names_the_present_one(before_load, monkeypatch, caplog):
    monkeypatch.setenv("FMD_EXT_CUDA_PREFILL", "sm90")
    library.load()
    library.load()
    assert caplog.messages == [
        "fmd_ext: the environment variable FMD_EXT_CUDA_PREFILL=sm90 is not read any more; "
        "FMD_EXT_CUDA_KERNELS=branched_prefill=sm90 takes its place"
    ]


@pytest.mark.skipif(library.load()["cuda"].loaded, reason="the CUDA library is loaded: there is a kernel to choose")
def test_no_cuda_kernel_to_choose():
    assert library.cuda_kernel("branched_prefill", (9, 0)) is None and library.cuda_kernels() == []
    with pytest.raises(RuntimeError, match="there is no CUDA kernel to choose: (this installation|torch)"):
        library.select_cuda_kernel("branched_prefill", "sm90")

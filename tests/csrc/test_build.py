"""What a build leaves in the package, and the scripts that check it. Nothing of ours is compiled here."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import fmd_build_tools as tools
import fmd_ext
from fmd_ext import _core
from paths import ROOT

PACKAGE = Path(fmd_ext.__file__).resolve().parent
LIBRARIES = sorted((PACKAGE / "lib").glob("*.so"))


def script(name):
    """The module of a script of the repository."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestWhatWasBuilt:
    def test_build_info(self):
        info = _core.build_info()
        assert info["version"] == re.search(r'(?m)^version = "(.+)"', (ROOT / "pyproject.toml").read_text())[1]
        assert info["torch_target_version"] == tools.TORCH_TARGET_VERSION == "0x020a000000000000"
        assert tools.leading_numbers(info["torch_version"]) >= tools.MIN_TORCH
        assert info["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
        assert info["isa_variants"][0] == "baseline"
        assert ("avx2" in info["isa_variants"]) == (info["processor"] == "x86_64")
        assert re.fullmatch(r"(GNU|Clang) [\d.]+", info["compiler"])
        assert "-std=c++17" in info["cxx_flags"]
        assert info["build_type"] in ("Release", "RelWithDebInfo", "Debug")
        assert info["cuda"] == bool(info["cuda_architectures"]) == bool(info["cuda_compiler"])
        assert info["cuda_reason"]

    def test_libraries_are_those_of_the_build(self):
        names = {path.name for path in LIBRARIES}
        assert names == {"libfmd_ext_cpu.so"} | ({"libfmd_ext_cuda.so"} if _core.build_info()["cuda"] else set())

    @pytest.mark.parametrize("library", [*LIBRARIES, Path(_core.__file__)], ids=lambda path: path.name)
    def test_no_path_of_the_build_machine_is_kept(self, library):
        said = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
        assert "(NEEDED)" in said
        assert "RPATH" not in said and "RUNPATH" not in said
        assert not re.search(r"\(NEEDED\).*\[.*/.*\]", said)
        content = library.read_bytes()
        for folder in (ROOT, Path(torch.__file__).parent):
            assert f"{folder}/".encode() not in content


@pytest.fixture(scope="module")
def check_wheel():
    return script("check_wheel")


@pytest.fixture(scope="module")
def stable(check_wheel):
    return check_wheel.stable_symbols()


class TestCheckWheel:
    """What the libraries ask of the machine that loads them."""

    @pytest.mark.parametrize("library", [*LIBRARIES, Path(_core.__file__)], ids=lambda path: path.name)
    def test_what_was_built_needs_the_stable_abi_alone(self, check_wheel, stable, library):
        assert check_wheel.problems(library, stable) == []
        used = set(check_wheel.undefined_symbols(library)) & stable
        assert ("torch_call_dispatcher" in used) == (library in LIBRARIES)

    def test_functions_newer_than_the_target_are_not_stable(self, check_wheel, stable, monkeypatch):
        """torch's headers declare them for a later target only."""
        assert {"torch_parallel_for", "aoti_torch_get_current_cuda_stream"} <= stable
        header = (check_wheel.torch_include() / check_wheel.STABLE_HEADERS[0]).read_text()
        if "TORCH_VERSION_2_11_0" not in header:
            pytest.skip("this torch has no stable functions that are newer than 2.10")
        monkeypatch.setattr(tools, "TORCH_TARGET_VERSION", "0x020b000000000000")
        assert stable < check_wheel.stable_symbols()

    @pytest.mark.parametrize(
        "name,code,said",
        [
            (
                "libfmd_ext_cpu.so",
                "namespace at { void f(); } void g() { at::f(); }",
                "uses _ZN2at1fEv, which is not of",
            ),
            ("libfmd_ext_cpu.so", 'extern "C" void torch_no_such(); void g() { torch_no_such(); }', "torch_no_such"),
            (
                "_core.x.so",
                'extern "C" int torch_call_dispatcher(); int g() { return torch_call_dispatcher(); }',
                "uses",
            ),
            ("libfmd_ext_cpu.so", "", "needs libtorch_cuda.so"),
        ],
    )
    def test_what_is_wrong_is_seen(self, check_wheel, stable, tmp_path, name, code, said):
        compiler = tools.require_compiler().command
        (tmp_path / "x.cpp").write_text(code)
        torch_cuda = tmp_path / "libtorch_cuda.so"
        soname = "-Wl,-soname,libtorch_cuda.so"
        subprocess.run([*compiler, "-shared", soname, "-x", "c++", "/dev/null", "-o", torch_cuda], check=True)
        linked = [] if code else ["-Wl,--no-as-needed", torch_cuda]
        subprocess.run([*compiler, "-shared", "-fPIC", tmp_path / "x.cpp", *linked, "-o", tmp_path / name], check=True)
        [problem] = check_wheel.problems(tmp_path / name, stable)
        assert said in problem

    def test_a_whole_wheel(self, tmp_path):
        path = tmp_path / "fmd_ext-0-cp311-linux.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.write(_core.__file__, "fmd_ext/" + Path(_core.__file__).name)
            wheel.write(PACKAGE / "lib" / "libfmd_ext_cpu.so", "fmd_ext/lib/libfmd_ext_cpu.so")
        command = [sys.executable, ROOT / "scripts" / "check_wheel.py", path]
        good = subprocess.run(command, capture_output=True, text=True)
        assert good.returncode == 0, good.stderr
        assert re.search(r"libfmd_ext_cpu.so: uses \d+ of \d+ functions of torch's stable ABI, 0 problems", good.stdout)
        without_cuda = subprocess.run([*command, "--cuda"], capture_output=True, text=True)
        assert without_cuda.returncode == 1 and "the wheel holds no libfmd_ext_cuda.so" in without_cuda.stderr


@pytest.fixture(scope="module")
def check_headers():
    loader = importlib.machinery.SourceFileLoader("check_headers", str(ROOT / "scripts" / "check_headers"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("check_headers", loader))
    loader.exec_module(module)
    return module


class TestCheckHeaders:
    """scripts/check_headers. The headers of other torch versions are not here; those of the installed one are."""

    def test_every_source_that_includes_torch_is_checked(self, check_headers):
        found = check_headers.sources()
        there = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "torch").rglob("*.cpp")}
        assert {file for _, file, _ in found} == there
        told = {library: definitions for library, _, definitions in found}
        version = f"TORCH_TARGET_VERSION={tools.TORCH_TARGET_VERSION}"
        assert set(told) == {"fmd_ext_cpu", "fmd_ext_cuda"} and all(version in words for words in told.values())
        assert "USE_CUDA" in told["fmd_ext_cuda"] and "USE_CUDA" not in told["fmd_ext_cpu"]

    def test_a_source_that_cmake_does_not_name(self, check_headers, monkeypatch, tmp_path):
        (tmp_path / "csrc" / "torch").mkdir(parents=True)
        (tmp_path / "csrc" / "torch" / "new.cpp").touch()
        cmake = "set(FMD_CPU_SOURCES csrc/plan.cpp)\nadd_library(fmd_ext_cpu SHARED ${FMD_CPU_SOURCES})\n"
        (tmp_path / "CMakeLists.txt").write_text(cmake)
        monkeypatch.setattr(check_headers, "ROOT", tmp_path)
        with pytest.raises(SystemExit, match="disagree about csrc/torch/new.cpp"):
            check_headers.sources()
        glob = "file(GLOB FMD_CPU_SOURCES CONFIGURE_DEPENDS csrc/torch/*.cpp)\n"
        (tmp_path / "CMakeLists.txt").write_text(glob + cmake.splitlines()[1])
        assert check_headers.sources() == [("fmd_ext_cpu", "csrc/torch/new.cpp", ())]

    @pytest.mark.parametrize("macro,passes", [("TORCH_ERROR_CODE_CHECK", True), ("NO_SUCH_CHECK", False)])
    def test_an_error_is_seen(self, check_headers, tmp_path, macro, passes):
        """The macro of torch 2.13 alone had kept 2.10 to 2.12 from building."""
        source = tmp_path / "x.cpp"
        source.write_text(
            "#include <torch/csrc/inductor/aoti_torch/c/shim.h>\n#include <torch/headeronly/util/shim_utils.h>\n"
            f"void* stream() {{ void* s; {macro}(aoti_torch_get_current_cuda_stream(0, &s)); return s; }}\n"
        )
        include = Path(torch.__file__).parent / "include"
        error = check_headers.first_error(tools.require_compiler(), include, str(source), ["USE_CUDA"])
        assert error is None if passes else macro in error

    def test_what_the_cache_lacks_is_named(self, tmp_path):
        command = [sys.executable, ROOT / "scripts" / "check_headers", "--cached", "--cache", tmp_path]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
        assert said.stdout.startswith("fmd_ext: not checked, since ") and "torch 2.10, 2.11, 2.12, 2.13" in said.stdout
        too_old = subprocess.run([*command, "2.9"], capture_output=True, text=True)
        assert too_old.returncode == 2 and "2.9: accepted are minors from 2.10 on" in too_old.stderr

"""What the build decides beforehand, and what it leaves in the package. Nothing is compiled here."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import fmd_build
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


def fake_torch(folder, version, cuda=None, headers=True):
    package = folder / "torch"
    (package / "include" / "torch" / "csrc" / "stable").mkdir(parents=True)
    if headers:
        (package / "include" / "torch" / "csrc" / "stable" / "library.h").touch()
    (package / "version.py").write_text(
        f"from typing import Optional\n__version__ = '{version}'\ndebug = False\ncuda: Optional[str] = {cuda!r}\n"
        "hip: Optional[str] = None\n"
    )
    return package


def fake_program(folder, name, says="", status=0):
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\necho '{says}' >&2\nexit {status}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def only_compiler(tmp_path, monkeypatch):
    """A PATH on which there is a C++ compiler and nothing else; the folder."""
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "c++").symlink_to(compiler)
    # What the compiler calls in turn; cmake, ninja and nvcc may lie in the same folder and must not be seen.
    for name in ("as", "ld", "gcc", "cc1plus"):
        if shutil.which(name):
            (programs / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("FMD_EXT_CUDA", raising=False)
    monkeypatch.setattr(fmd_build, "scripts_folder", lambda: "")
    return programs


class TestFindTorch:
    def test_the_installed_one_is_found_without_importing_it(self):
        code = "import sys, fmd_build; t = fmd_build.require_torch(); print(t.path, t.version, 'torch' in sys.modules)"
        said = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "build_backend"), *sys.path])},
            capture_output=True,
            text=True,
            check=True,
        )
        assert said.stdout.split() == [str(Path(torch.__file__).parent), torch.__version__, "False"]

    def test_it_is_found_when_isolation_hides_the_site_packages(self, tmp_path):
        """pip's build isolation takes the environment's folders off sys.path; setuptools comes from elsewhere."""
        import setuptools

        (tmp_path / "setuptools").symlink_to(Path(setuptools.__file__).parent)
        code = (
            "import sys; sys.path = [p for p in sys.path if not p.endswith('-packages')]\n"
            f"sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT / 'build_backend')!r}]\n"
            "try:\n    import torch\nexcept ImportError:\n    import fmd_build; print(fmd_build.find_torch().path)"
        )
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert said.stdout.strip() == str(Path(torch.__file__).parent)

    @pytest.mark.parametrize("setting,seen", [("true", True), ("false", False)])
    def test_a_venv_that_includes_the_system_packages(self, tmp_path, monkeypatch, setting, seen):
        short = f"python{sys.version_info.major}.{sys.version_info.minor}"
        package = fake_torch(tmp_path / "base" / "lib" / short / "site-packages", "2.10.0")
        (tmp_path / "venv").mkdir()
        (tmp_path / "venv" / "pyvenv.cfg").write_text(f"home = /x\ninclude-system-site-packages = {setting}\n")
        monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
        monkeypatch.setattr(sys, "base_prefix", str(tmp_path / "base"))
        assert (package.parent in fmd_build.search_folders()) == seen

    def test_version_and_cuda(self, tmp_path):
        package = fake_torch(tmp_path, "2.14.0a0+git12", cuda="13.0")
        assert fmd_build.find_torch([tmp_path / "no", tmp_path]) == fmd_build.Torch(package, "2.14.0a0+git12", "13.0")

    def test_nearest_first(self, tmp_path):
        fake_torch(tmp_path / "far", "2.10.0")
        near = fake_torch(tmp_path / "near", "2.12.1")
        assert fmd_build.find_torch([tmp_path / "near", tmp_path / "far"]).path == near

    def test_none(self, tmp_path):
        assert fmd_build.find_torch([tmp_path]) is None

    @pytest.mark.parametrize("version", ("2.9.1", "2.9.1+cu128", "1.13.0"))
    def test_too_old(self, tmp_path, version):
        fake_torch(tmp_path, version)
        with pytest.raises(SystemExit, match=rf"fmd_ext: the installed torch is {re.escape(version)} .*torch >= 2\.10"):
            fmd_build.find_torch([tmp_path])

    def test_damaged(self, tmp_path):
        fake_torch(tmp_path, "2.13.0")
        (tmp_path / "torch" / "version.py").write_text("")
        with pytest.raises(SystemExit, match="names no version"):
            fmd_build.find_torch([tmp_path])

    def test_without_headers(self, tmp_path, monkeypatch):
        fake_torch(tmp_path, "2.13.0", headers=False)
        monkeypatch.setattr(fmd_build, "search_folders", lambda: [tmp_path])
        with pytest.raises(SystemExit, match=r"2\.13\.0 has no C\+\+ headers \(.*library\.h is missing\)"):
            fmd_build.require_torch()


class TestRequirements:
    def test_nothing_where_everything_is_there(self, only_compiler, tmp_path, monkeypatch):
        fake_torch(tmp_path, "2.13.0")
        monkeypatch.setattr(fmd_build, "search_folders", lambda: [tmp_path])
        fake_program(only_compiler, "cmake", "cmake version 3.25.1")
        fake_program(only_compiler, "ninja", "1.11.1.git.kitware")
        assert fmd_build.build_requirements() == []

    def test_all_where_nothing_is_there(self, only_compiler, monkeypatch):
        monkeypatch.setattr(fmd_build, "search_folders", lambda: [])
        assert fmd_build.build_requirements() == ["torch>=2.10", "cmake>=3.24", "ninja>=1.10"]

    @pytest.mark.parametrize("says,status", [("cmake version 3.18.4", 0), ("No module named cmake", 1), ("", 0)])
    def test_an_old_or_broken_cmake_does_not_count(self, only_compiler, tmp_path, monkeypatch, says, status):
        fake_torch(tmp_path, "2.13.0")
        monkeypatch.setattr(fmd_build, "search_folders", lambda: [tmp_path])
        fake_program(only_compiler, "cmake", says, status)
        fake_program(only_compiler, "ninja", "1.13.2")
        assert fmd_build.build_requirements() == ["cmake>=3.24"]

    def test_the_next_cmake_on_path_is_tried(self, only_compiler, tmp_path, monkeypatch):
        fake_program(only_compiler, "cmake", "cmake version 3.18.4")
        (tmp_path / "new").mkdir()
        new = fake_program(tmp_path / "new", "cmake", "cmake version 4.0.1")
        monkeypatch.setenv("PATH", os.pathsep.join([str(only_compiler), str(tmp_path / "new")]))
        assert fmd_build.find_tool("cmake", fmd_build.MIN_CMAKE) == new

    def test_what_cannot_succeed_is_said_before_anything_is_downloaded(self, only_compiler, monkeypatch):
        monkeypatch.setattr(fmd_build, "search_folders", lambda: [])
        monkeypatch.setenv("FMD_EXT_CUDA", "yes")
        with pytest.raises(SystemExit, match="FMD_EXT_CUDA=yes is not understood"):
            fmd_build.build_requirements()


class TestCompiler:
    def test_found(self, only_compiler):
        assert fmd_build.require_compiler() == only_compiler / "c++"

    def test_missing(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        with pytest.raises(SystemExit, match=r"fmd_ext: no C\+\+ compiler found: there is no c\+\+, g\+\+ or clang"):
            fmd_build.require_compiler()

    def test_cxx_names_nothing(self, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(SystemExit, match="CXX=no-such-compiler is no program"):
            fmd_build.require_compiler()

    def test_one_that_does_not_work(self, tmp_path, monkeypatch):
        monkeypatch.setenv("CXX", str(fake_program(tmp_path, "c++", "fatal error: optional: No such file", 1)))
        with pytest.raises(SystemExit, match=r"cannot compile a small C\+\+17 program \(fatal error: optional"):
            fmd_build.require_compiler()

    def test_python_header(self, tmp_path, monkeypatch):
        monkeypatch.setattr(fmd_build.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
        with pytest.raises(SystemExit, match=r"Python\.h of Python 3\.\d+ is missing"):
            fmd_build.require_python_header()


class TestCuda:
    cpu = fmd_build.Torch(Path("/t"), "2.13.0+cpu", None)
    gpu = fmd_build.Torch(Path("/t"), "2.13.0", "13.0")
    nvcc = Path("/cuda/bin/nvcc")

    @pytest.mark.parametrize(
        "asked,nvcc,torch_,built,why",
        [
            ("0", nvcc, gpu, False, "FMD_EXT_CUDA=0"),
            ("1", nvcc, cpu, True, "FMD_EXT_CUDA=1, /cuda/bin/nvcc"),
            ("auto", nvcc, gpu, True, "FMD_EXT_CUDA=auto, /cuda/bin/nvcc and torch 2.13.0 with CUDA 13.0"),
            ("auto", nvcc, cpu, False, "FMD_EXT_CUDA=auto, and the installed torch 2.13.0+cpu has no CUDA"),
            ("auto", None, gpu, False, "FMD_EXT_CUDA=auto, and no nvcc was found for torch 2.13.0"),
        ],
    )
    def test_decision(self, asked, nvcc, torch_, built, why):
        assert fmd_build.decide_cuda(asked, nvcc, torch_) == (built, why)

    @pytest.mark.parametrize("asked", ("", "yes", "2", "AUTO"))
    def test_other_values(self, asked):
        with pytest.raises(SystemExit, match=f"FMD_EXT_CUDA={asked} is not understood: set it to 0, 1 or auto"):
            fmd_build.decide_cuda(asked, self.nvcc, self.gpu)

    def test_asked_for_without_nvcc(self):
        with pytest.raises(SystemExit, match="FMD_EXT_CUDA=1 asks for the CUDA library, but no nvcc was found"):
            fmd_build.decide_cuda("1", None, self.gpu)

    def test_nvcc_of_cuda_home_comes_first(self, tmp_path, monkeypatch):
        (tmp_path / "bin").mkdir()
        nvcc = fake_program(tmp_path / "bin", "nvcc")
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        assert fmd_build.find_nvcc() == nvcc
        nvcc.unlink()
        assert fmd_build.find_nvcc() is None


class TestWhatWasBuilt:
    def test_build_info(self):
        info = _core.build_info()
        assert info["version"] == re.search(r'(?m)^version = "(.+)"', (ROOT / "pyproject.toml").read_text())[1]
        assert info["torch_target_version"] == fmd_build.TORCH_TARGET_VERSION == "0x020a000000000000"
        assert fmd_build._leading_numbers(info["torch_version"]) >= fmd_build.MIN_TORCH
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
        monkeypatch.setattr(check_wheel, "target_version", lambda: "0x020b000000000000")
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
        compiler = os.environ.get("CXX") or "c++"
        (tmp_path / "x.cpp").write_text(code)
        torch_cuda = tmp_path / "libtorch_cuda.so"
        soname = "-Wl,-soname,libtorch_cuda.so"
        subprocess.run([compiler, "-shared", soname, "-x", "c++", "/dev/null", "-o", torch_cuda], check=True)
        linked = [] if code else ["-Wl,--no-as-needed", torch_cuda]
        subprocess.run([compiler, "-shared", "-fPIC", tmp_path / "x.cpp", *linked, "-o", tmp_path / name], check=True)
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

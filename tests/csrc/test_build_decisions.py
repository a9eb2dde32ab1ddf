"""What a build decides beforehand: the tools, the torch, whether to compile, and CUDA. Nothing is compiled here."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fmd_build_tools as tools
from paths import ROOT


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
    monkeypatch.setattr(tools, "scripts_folder", lambda: "")
    return programs


class TestFindTorch:
    def test_the_installed_one_is_found_without_importing_it(self):
        code = (
            "import sys, fmd_build_tools; torch = fmd_build_tools.require_torch()\n"
            "print(torch.path, torch.version, 'torch' in sys.modules)"
        )
        said = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "build_backend"), *sys.path])},
            capture_output=True,
            text=True,
            check=True,
        )
        assert said.stdout.split() == [str(Path(torch.__file__).parent), torch.__version__, "False"]

    def test_it_is_found_when_isolation_hides_the_site_packages(self):
        """pip's build isolation takes the environment's folders off sys.path."""
        code = (
            "import sys; sys.path = [p for p in sys.path if not p.endswith('-packages')]\n"
            f"sys.path.insert(0, {str(ROOT / 'build_backend')!r})\n"
            "try:\n    import torch\nexcept ImportError:\n"
            "    import fmd_build_tools\n    print(fmd_build_tools.find_torch().path)"
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
        assert (package.parent in tools.search_folders()) == seen

    def test_version_and_cuda(self, tmp_path):
        package = fake_torch(tmp_path, "2.14.0a0+git12", cuda="13.0")
        assert tools.find_torch([tmp_path / "no", tmp_path]) == tools.Torch(package, "2.14.0a0+git12", "13.0")

    def test_nearest_first(self, tmp_path):
        fake_torch(tmp_path / "far", "2.10.0")
        near = fake_torch(tmp_path / "near", "2.12.1")
        assert tools.find_torch([tmp_path / "near", tmp_path / "far"]).path == near

    def test_none(self, tmp_path):
        assert tools.find_torch([tmp_path]) is None

    @pytest.mark.parametrize("version", ("2.9.1", "2.9.1+cu128", "1.13.0"))
    def test_too_old(self, tmp_path, version):
        fake_torch(tmp_path, version)
        with pytest.raises(SystemExit, match=rf"fmd_ext: the installed torch is {re.escape(version)} .*torch >= 2\.10"):
            tools.find_torch([tmp_path])

    def test_damaged(self, tmp_path):
        fake_torch(tmp_path, "2.13.0")
        (tmp_path / "torch" / "version.py").write_text("")
        with pytest.raises(SystemExit, match="names no version"):
            tools.find_torch([tmp_path])

    def test_without_headers(self, tmp_path, monkeypatch):
        fake_torch(tmp_path, "2.13.0", headers=False)
        monkeypatch.setattr(tools, "search_folders", lambda: [tmp_path])
        with pytest.raises(SystemExit, match=r"2\.13\.0 has no C\+\+ headers \(.*library\.h is missing\)"):
            tools.require_torch()


class TestRequirements:
    def test_nothing_where_everything_is_there(self, only_compiler, tmp_path, monkeypatch):
        fake_torch(tmp_path, "2.13.0")
        monkeypatch.setattr(tools, "search_folders", lambda: [tmp_path])
        fake_program(only_compiler, "cmake", "cmake version 3.25.1")
        fake_program(only_compiler, "ninja", "1.11.1.git.kitware")
        assert tools.build_requirements() == []

    def test_all_where_nothing_is_there_and_pip_brings_it(self, only_compiler, monkeypatch):
        monkeypatch.setattr(tools, "search_folders", lambda: [])
        monkeypatch.setattr(sys, "path", ["/tmp/pip-build-env-x1/overlay", *sys.path])
        assert tools.build_requirements() == ["torch>=2.10", "cmake>=3.24", "ninja>=1.10"]

    @pytest.mark.parametrize("says,status", [("cmake version 3.18.4", 0), ("No module named cmake", 1), ("", 0)])
    def test_an_old_or_broken_cmake_does_not_count(self, only_compiler, tmp_path, monkeypatch, says, status):
        fake_torch(tmp_path, "2.13.0")
        monkeypatch.setattr(tools, "search_folders", lambda: [tmp_path])
        fake_program(only_compiler, "cmake", says, status)
        fake_program(only_compiler, "ninja", "1.13.2")
        assert tools.build_requirements() == ["cmake>=3.24"]

    def test_the_next_cmake_on_path_is_tried(self, only_compiler, tmp_path, monkeypatch):
        fake_program(only_compiler, "cmake", "cmake version 3.18.4")
        (tmp_path / "new").mkdir()
        new = fake_program(tmp_path / "new", "cmake", "cmake version 4.0.1")
        monkeypatch.setenv("PATH", os.pathsep.join([str(only_compiler), str(tmp_path / "new")]))
        assert tools.find_tool("cmake", tools.MIN_CMAKE) == new

    def test_what_cannot_succeed_is_said_before_anything_is_downloaded(self, only_compiler, monkeypatch):
        monkeypatch.setattr(tools, "search_folders", lambda: [])
        monkeypatch.setattr(tools, "is_pip", lambda: True)
        monkeypatch.setenv("FMD_EXT_CUDA", "yes")
        with pytest.raises(SystemExit, match="FMD_EXT_CUDA=yes is not understood"):
            tools.build_requirements()

    def test_nothing_for_an_installation_that_compiles_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tools, "search_folders", lambda: [])
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        assert tools.build_requirements() == []


class TestTemporaryEnvironment:
    """`uv pip` and `python -m build` build in an environment that is made for the build and holds no torch."""

    @pytest.fixture
    def environment(self, only_compiler, tmp_path, monkeypatch):
        """It, as `sys.prefix`; beside it the user's, with a torch."""
        fake_torch(tmp_path / "mine" / "lib" / "python3.12" / "site-packages", "2.12.1", cuda="13.0")
        folder = tmp_path / "build-env-x1"
        folder.mkdir()
        (folder / "pyvenv.cfg").write_text("home = /x\ninclude-system-site-packages = false\n")
        monkeypatch.setattr(tools.tempfile, "gettempdir", lambda: str(tmp_path))
        monkeypatch.setattr(tools, "search_folders", lambda: [folder])
        monkeypatch.setattr(sys, "prefix", str(folder))
        for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
            monkeypatch.delenv(name, raising=False)
        return folder

    @pytest.mark.parametrize("variable", ("VIRTUAL_ENV", "CONDA_PREFIX"))
    def test_the_activated_environment(self, environment, monkeypatch, variable):
        monkeypatch.setenv(variable, str(environment.parent / "mine"))
        assert tools.require_torch().version == "2.12.1"
        assert "torch>=2.10" not in tools.build_requirements()

    def test_the_environment_that_made_it(self, environment):
        mine = environment.parent / "mine"
        with open(environment / "pyvenv.cfg", "a") as config:
            config.write(f"command = {mine}/bin/python -m venv --without-pip {environment}\n")
        assert tools.require_torch().version == "2.12.1"

    def test_none_is_named(self, environment, monkeypatch):
        """uv overwrites VIRTUAL_ENV with the temporary one. A second torch is not downloaded."""
        monkeypatch.setenv("VIRTUAL_ENV", str(environment))
        with pytest.raises(
            SystemExit, match=r"no torch is installed for .*--no-build-isolation; python -m build: --no-"
        ):
            tools.build_requirements()

    def test_an_environment_that_stays_is_the_users_own(self, environment, monkeypatch):
        """Another one that happens to be activated has no say."""
        monkeypatch.setenv("VIRTUAL_ENV", str(environment.parent / "mine"))
        monkeypatch.setattr(tools.tempfile, "gettempdir", lambda: "/elsewhere")
        assert tools.find_torch() is None


class TestCompiled:
    @pytest.fixture(autouse=True)
    def no_variables(self, monkeypatch):
        for name in ("CXX", "FMD_EXT_BUILD"):
            monkeypatch.delenv(name, raising=False)

    def test_with_a_compiler(self, only_compiler):
        assert tools.decide_compiled() == (True, "")

    def test_with_one_that_does_not_work(self, tmp_path, monkeypatch):
        """Its user meant to compile: require_compiler says what is wrong."""
        monkeypatch.setenv("CXX", str(fake_program(tmp_path, "c++", "no such file", 1)))
        assert tools.decide_compiled()[0]

    def test_without_a_compiler(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        compiled, why = tools.decide_compiled()
        assert not compiled and "no C++ compiler was found" in why
        monkeypatch.setenv("FMD_EXT_BUILD", "compiled")
        assert tools.decide_compiled()[0]

    def test_asked_for(self, only_compiler, monkeypatch):
        monkeypatch.setenv("FMD_EXT_BUILD", "python")
        assert tools.decide_compiled() == (False, "FMD_EXT_BUILD=python")

    def test_on_another_system(self, only_compiler, monkeypatch):
        monkeypatch.setattr(tools.platform, "system", lambda: "Darwin")
        assert tools.decide_compiled() == (False, "the ops compile on Linux only, and this is Darwin")
        monkeypatch.setenv("FMD_EXT_BUILD", "compiled")
        with pytest.raises(
            SystemExit, match="FMD_EXT_BUILD=compiled, but the ops compile on Linux only, not on Darwin"
        ):
            tools.decide_compiled()

    def test_other_values(self, monkeypatch):
        monkeypatch.setenv("FMD_EXT_BUILD", "no")
        with pytest.raises(SystemExit, match="FMD_EXT_BUILD=no is not understood: set it to compiled, python or auto"):
            tools.decide_compiled()

    def test_nothing_of_an_earlier_build_stays(self, tmp_path, capsys):
        core = tmp_path / f"_core{tools.sysconfig.get_config_var('EXT_SUFFIX')}"
        core.touch()
        (tmp_path / "lib").mkdir()
        tools.leave_uncompiled(tmp_path, "because")
        assert [path.name for path in tmp_path.iterdir()] == ["_build_info.json"]
        assert json.loads((tmp_path / "_build_info.json").read_text()) == {"compiled": False, "reason": "because"}
        [line] = capsys.readouterr().err.splitlines()
        assert line == "fmd_ext: warning: nothing is compiled, torch's own attention will serve: because."
        tools.remove_compiled(tmp_path)
        assert list(tmp_path.iterdir()) == []


class TestCompiler:
    def test_found(self, only_compiler):
        assert tools.require_compiler() == tools.Compiler(str(only_compiler / "c++"))

    def test_with_launchers_and_flags(self, only_compiler, monkeypatch):
        launcher = fake_program(only_compiler, "ccache")
        launcher.write_text('#!/bin/sh\nexec "$@"\n')
        monkeypatch.setenv("CXX", "ccache c++ -O1 -DX='a b'")
        found = tools.require_compiler()
        assert found == tools.Compiler(str(only_compiler / "c++"), (str(launcher),), ("-O1", "-DX=a b"))
        assert found.command == [str(launcher), str(only_compiler / "c++"), "-O1", "-DX=a b"]

    def test_a_path_with_a_space(self, only_compiler, tmp_path, monkeypatch):
        (tmp_path / "my tools").mkdir()
        (tmp_path / "my tools" / "c++").symlink_to(only_compiler / "c++")
        monkeypatch.setenv("CXX", str(tmp_path / "my tools" / "c++"))
        assert tools.require_compiler().program == str(tmp_path / "my tools" / "c++")

    def test_flags_reach_the_trial(self, only_compiler, monkeypatch):
        monkeypatch.setenv("CXX", "c++ -no-such-flag")
        with pytest.raises(SystemExit, match=r"c\+\+ -no-such-flag cannot compile .*FMD_EXT_BUILD=python installs"):
            tools.require_compiler()

    @pytest.mark.parametrize("asked", ("nothing g++", "ccache nothing -O2", "-O2"))
    def test_no_program(self, only_compiler, monkeypatch, asked):
        fake_program(only_compiler, "ccache")
        fake_program(only_compiler, "g++")
        monkeypatch.setenv("CXX", asked)
        wrong = "-O2" if asked == "-O2" else "nothing"
        with pytest.raises(SystemExit, match=re.escape(f"CXX={asked}, but {wrong} is no program")):
            tools.require_compiler()

    def test_missing(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        with pytest.raises(SystemExit, match=r"fmd_ext: no C\+\+ compiler found: there is no c\+\+, g\+\+ or clang"):
            tools.require_compiler()

    def test_cxx_names_nothing(self, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(SystemExit, match="CXX=no-such-compiler, but no-such-compiler is no program"):
            tools.require_compiler()

    def test_one_that_does_not_work(self, tmp_path, monkeypatch):
        monkeypatch.setenv("CXX", str(fake_program(tmp_path, "c++", "fatal error: optional: No such file", 1)))
        with pytest.raises(SystemExit, match=r"cannot compile a small C\+\+17 program \(fatal error: optional"):
            tools.require_compiler()

    def test_python_header(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tools.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
        with pytest.raises(SystemExit, match=r"Python\.h of Python 3\.\d+ is missing"):
            tools.require_python_header()


class TestCuda:
    cpu = tools.Torch(Path("/t"), "2.13.0+cpu", None)
    gpu = tools.Torch(Path("/t"), "2.13.0", "13.0")
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
        assert tools.decide_cuda(asked, nvcc, torch_) == (built, why)

    @pytest.mark.parametrize("asked", ("", "yes", "2", "AUTO"))
    def test_other_values(self, asked):
        with pytest.raises(SystemExit, match=f"FMD_EXT_CUDA={asked} is not understood: set it to 0, 1 or auto"):
            tools.decide_cuda(asked, self.nvcc, self.gpu)

    def test_asked_for_without_nvcc(self):
        with pytest.raises(SystemExit, match="FMD_EXT_CUDA=1 asks for the CUDA library, but no nvcc was found"):
            tools.decide_cuda("1", None, self.gpu)

    def test_nvcc_of_cuda_home_comes_first(self, tmp_path, monkeypatch):
        (tmp_path / "bin").mkdir()
        nvcc = fake_program(tmp_path / "bin", "nvcc")
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        assert tools.find_nvcc() == nvcc
        nvcc.unlink()
        assert tools.find_nvcc() is None

"""Runs CMake, which holds the source list, and leaves what it built in the package. Metadata is in pyproject.toml."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
import fmd_build_tools as tools  # noqa: E402

COMPILED, WHY_NOT = tools.decide_compiled()


class CMakeBuild(build_ext):
    """`build_ext` through CMake: configure, build, install into the package (the source tree's with --inplace)."""

    def run(self):
        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        if not COMPILED:
            tools.leave_uncompiled(target / "fmd_ext", WHY_NOT)
            return
        cmake = str(tools.require_tool("cmake", tools.MIN_CMAKE))
        definitions = tools.cmake_definitions(self.distribution.get_version())
        if self.debug:
            definitions["CMAKE_BUILD_TYPE"] = "Debug"
        build = str(Path(self.build_temp).resolve())
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(tools.usable_cores())
        # --fresh: pip's isolated tools lie in a new folder every time, and CMake's cache would remember the old one.
        settings = [f"-D{key}={value}" for key, value in definitions.items()]
        self.cmake([cmake, "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", build, *settings], "configure")
        self.cmake([cmake, "--build", build, "--parallel", jobs], "compile")
        tools.remove_compiled(target / "fmd_ext")
        self.cmake([cmake, "--install", build, "--prefix", str(target)], "install")

    @staticmethod
    def cmake(command: list[str], step: str):
        sys.stdout.flush()
        if subprocess.run(command).returncode != 0:
            raise tools.BuildError(f"the {step} step of the build failed; the first error is printed above.")


class BuildPython(build_py):
    """`build_py`: all there is where nothing is compiled, since setuptools skips `build_ext` then."""

    def run(self):
        super().run()
        if not COMPILED:
            folder = ROOT if self.editable_mode else Path(self.build_lib).resolve()
            tools.leave_uncompiled(folder / "fmd_ext", WHY_NOT)


# The one extension named here makes the wheel one for this Python and platform; its sources are CMake's business.
EXTENSIONS = [Extension("fmd_ext._core", sources=[])] if COMPILED else []
setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython})

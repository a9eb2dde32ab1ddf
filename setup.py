"""Runs CMake, which holds the source list, and leaves what it built in the package. Metadata is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
import fmd_build  # noqa: E402


class CMakeBuild(build_ext):
    """`build_ext` through CMake: configure, build, install into the package (the source tree's with --inplace)."""

    def run(self):
        cmake = str(fmd_build.require_tool("cmake", fmd_build.MIN_CMAKE))
        definitions = fmd_build.cmake_definitions(self.distribution.get_version())
        if self.debug:
            definitions["CMAKE_BUILD_TYPE"] = "Debug"
        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        build = str(Path(self.build_temp).resolve())
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(len(os.sched_getaffinity(0)))
        # --fresh: pip's isolated tools lie in a new folder every time, and CMake's cache would remember the old one.
        settings = [f"-D{key}={value}" for key, value in definitions.items()]
        self.cmake([cmake, "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", build, *settings], "configure")
        self.cmake([cmake, "--build", build, "--parallel", jobs], "compile")
        # An earlier build with other settings must leave nothing behind here, and a library in use is not written over.
        shutil.rmtree(target / "fmd_ext" / "lib", ignore_errors=True)
        (target / self.get_ext_filename("fmd_ext._core")).unlink(missing_ok=True)
        self.cmake([cmake, "--install", build, "--prefix", str(target)], "install")

    @staticmethod
    def cmake(command: list[str], step: str):
        sys.stdout.flush()
        if subprocess.run(command).returncode != 0:
            raise fmd_build.BuildError(f"the {step} step of the build failed; the first error is printed above.")


# The one extension named here makes the wheel one for this Python and platform; its sources are CMake's business.
setup(ext_modules=[Extension("fmd_ext._core", sources=[])], cmdclass={"build_ext": CMakeBuild})

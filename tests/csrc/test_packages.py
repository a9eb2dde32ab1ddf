"""What is in an sdist, and in a wheel that holds nothing compiled. Both are built in a copy of the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from paths import ROOT


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The sources, and beside them what lies about in a folder that is worked in."""
    tree = tmp_path_factory.mktemp("packages") / "tree"
    left_out = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "lib", "*.so", "__pycache__", ".*_cache", "*.egg-info"
    )
    shutil.copytree(ROOT, tree, ignore=left_out)
    (tree / "fmd_ext" / "_build_info.json").write_text("{}")
    (tree / "csrc" / "x.so").touch()
    return tree


def call_backend(tree, code, **variables):
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "FMD_EXT_BUILD")} | variables
    environment["PYTHONPATH"] = os.pathsep.join([str(tree / "build_backend"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", f"import fmd_build; {code}"]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def uncompiled_wheel(tree, tmp_path_factory):
    """What the backend builds where there is no compiler; the wheel's path and what was said."""
    empty = tmp_path_factory.mktemp("empty")
    code = "print(fmd_build.get_requires_for_build_wheel(), fmd_build.build_wheel('dist'))"
    said = call_backend(tree, code, PATH=str(empty))
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines()[-1].startswith("[] fmd_ext-")
    [wheel] = (tree / "dist").glob("*.whl")
    return wheel, said.stderr


def test_without_a_compiler_the_wheel_is_for_every_platform(uncompiled_wheel):
    wheel, said = uncompiled_wheel
    assert wheel.name.endswith("-py3-none-any.whl")
    assert said.count("fmd_ext: warning: nothing is compiled") == 1
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        facts = json.loads(content.read("fmd_ext/_build_info.json"))
    assert facts["compiled"] is False and "no C++ compiler was found" in facts["reason"]
    assert "fmd_ext/patching/handle.py" in names and not [name for name in names if name.endswith(".so")]


def test_the_wheel_holds_licence_and_type_marker(uncompiled_wheel):
    with zipfile.ZipFile(uncompiled_wheel[0]) as content:
        names = content.namelist()
        [metadata] = [content.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
    assert "fmd_ext/lab/trained/model/README.md" in names
    assert "fmd_ext/py.typed" in names and any(name.endswith("/licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata


def test_the_sdist_holds_all_that_the_readme_and_the_tests_need(tree):
    said = call_backend(tree, "fmd_build.build_sdist('dist')")
    assert said.returncode == 0, said.stderr
    [path] = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = {member.name.partition("/")[2]: member for member in archive}
    wanted = ["LICENSE", "CHANGELOG.md", "CITATION.cff", "constraints.txt", ".clang-format", "docs/method.md"]
    wanted += ["scripts/environment.sh", "tests/conftest.py", "tests/support/paths.py", "tests/fixtures/clip.mp4"]
    wanted += ["csrc/plan.cpp", "python/module.cpp", "fmd_ext/lab/trained/model/model.safetensors", "fmd_ext/py.typed"]
    assert [name for name in wanted if name not in members] == []
    assert members["scripts/demo"].mode & 0o100
    assert [name for name in members if name.endswith((".so", ".pyc", "_build_info.json"))] == []


def test_the_scripts_work_without_a_compiler(tree):
    """In the folder itself; a second time there is nothing to do."""
    variables = {"FMD_EXT_PYTHON": sys.executable, "FMD_EXT_BUILD": "python", "BASH_ENV": ""}
    code = "source scripts/environment.sh; make_environment ''; echo once; make_environment ''; echo twice"
    said = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code], cwd=tree, env=os.environ | variables, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    first, _, second = said.stdout.partition("once\n")
    assert first == "fmd_ext: nothing is compiled, torch's own attention serves: FMD_EXT_BUILD=python\n"
    assert second == "twice\n"

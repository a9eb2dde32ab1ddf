"""One formatter and one linter per language, over the whole repository; and no torch header where none belongs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig

import pytest

from paths import ROOT

CXX_SUFFIXES = {".cpp", ".h", ".cu", ".cuh"}


def tool(name):
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        pytest.fail(f"{name} is not installed: pip install '.[test]' -c constraints.txt brings it")
    return path


def check(*command):
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if said.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command[:3]))}:\n{said.stdout}{said.stderr}", pytrace=False)


def cxx_files():
    files = [
        p
        for folder in ("csrc", "python", "tests/support")
        for p in (ROOT / folder).rglob("*")
        if p.suffix in CXX_SUFFIXES
    ]
    assert len(files) > 3
    return sorted(files)


def test_python_lint():
    check(tool("ruff"), "check", "--no-cache", ".")


def test_python_format():
    check(tool("ruff"), "format", "--check", "--no-cache", ".")


def test_python_types():
    """Of the rooms that `patch` runs through; pyproject.toml says which, and what is taken as it comes."""
    check(tool("mypy"))


def test_cxx_format():
    check(tool("clang-format"), "--dry-run", "-Werror", *map(str, cxx_files()))


def test_no_torch_header_outside_csrc_torch():
    pattern = re.compile(r'(?m)^\s*#\s*include\s*[<"](?:torch|ATen|c10)/.*$')
    allowed = ROOT / "csrc" / "torch"
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in cxx_files()
        if allowed not in path.parents
        for line in pattern.findall(path.read_text())
    ]
    assert found == []
    assert any(pattern.search(path.read_text()) for path in allowed.glob("*.h")), "the pattern finds none at all"


def test_files_stay_short():
    """A file near 300 lines, split before 500."""
    python = [p for folder in ("fmd_ext", "tests", "build_backend") for p in (ROOT / folder).rglob("*.py")]
    long = {
        str(path.relative_to(ROOT)): lines
        for path in [*python, *cxx_files()]
        if (lines := len(path.read_text().splitlines())) >= 500
    }
    assert long == {}

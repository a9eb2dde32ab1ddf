"""The in-tree build backend: setuptools' own hooks, plus what has to be known before CMake runs.

The extension is built against the torch that is already installed, under pip's build isolation too. Isolation takes the
environment's folders off `sys.path`, but `sysconfig` still names them: that is where torch's headers are looked for.
Torch is never imported here, its version is read from `torch/version.py`. Only where no torch is installed does the
backend ask for one.

`setup.py` uses the same functions to find the tools and to decide about CUDA, so that there is one place that decides.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import build_meta as _setuptools_hooks
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)

MIN_TORCH = (2, 10)
MIN_CMAKE = (3, 24)
MIN_NINJA = (1, 10)
# What the op libraries may use of torch: the stable ABI as of 2.10, so that every later torch loads them.
TORCH_TARGET_VERSION = "0x020a000000000000"


class BuildError(SystemExit):
    """Ends the build with one sentence and no traceback."""

    def __init__(self, sentence: str):
        super().__init__(f"fmd_ext: {sentence}")


@dataclass(frozen=True)
class Torch:
    """An installed torch, as far as a build needs to know it."""

    path: Path  # the package's folder
    version: str  # such as "2.13.0+cpu"
    cuda: str | None  # the CUDA version it was built with


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _leading_numbers(text: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def search_folders() -> list[Path]:
    """Where packages of this environment can lie, nearest first: `sys.path`, then what build isolation hid of it."""
    folders = [entry for entry in sys.path if entry]
    for key in ("purelib", "platlib"):
        folders.append(sysconfig.get_paths()[key])
    config = Path(sys.prefix, "pyvenv.cfg")
    in_venv = config.is_file()
    if in_venv and re.search(r"(?mi)^include-system-site-packages\s*=\s*true", config.read_text()):
        base = {"base": sys.base_prefix, "platbase": sys.base_prefix, "installed_base": sys.base_prefix}
        folders += [sysconfig.get_paths(vars=base)[key] for key in ("purelib", "platlib")]
        folders += site.getsitepackages([sys.base_prefix])
        in_venv = False
    if not in_venv:
        folders.append(site.getusersitepackages())
    return [Path(folder) for folder in dict.fromkeys(folders)]


def find_torch(folders: list[Path] | None = None) -> Torch | None:
    """The torch installed in this environment, or None. Raises BuildError if it is older than 2.10."""
    for folder in search_folders() if folders is None else folders:
        version_file = folder / "torch" / "version.py"
        if not version_file.is_file():
            continue
        text = version_file.read_text()
        version = re.search(r"(?m)^__version__\s*=\s*['\"]([^'\"]+)['\"]", text)
        if not version:
            raise BuildError(f"{version_file} names no version: the installed torch is damaged, reinstall it.")
        if _leading_numbers(version[1])[:2] < MIN_TORCH:
            raise BuildError(
                f"the installed torch is {version[1]} ({folder / 'torch'}), but fmd_ext needs torch >= "
                f"{_dotted(MIN_TORCH)}: upgrade torch first."
            )
        cuda = re.search(r"(?m)^cuda\b[^=]*=\s*['\"]([^'\"]+)['\"]", text)
        return Torch(folder / "torch", version[1], cuda[1] if cuda else None)
    return None


def require_torch() -> Torch:
    """The installed torch with its headers, or a BuildError."""
    torch = find_torch()
    if torch is None:
        raise BuildError(f"no torch is installed for {sys.executable}: install torch >= {_dotted(MIN_TORCH)} first.")
    header = torch.path / "include" / "torch" / "csrc" / "stable" / "library.h"
    if not header.is_file():
        raise BuildError(f"the installed torch {torch.version} has no C++ headers ({header} is missing): reinstall it.")
    return torch


def scripts_folder() -> str:
    """Where this environment's own programs lie; not on PATH when the environment is used without activating it."""
    return sysconfig.get_path("scripts")


def find_tool(name: str, minimum: tuple[int, ...]) -> Path | None:
    """The first `name` on PATH, or beside this Python, that runs and is new enough; None if there is none."""
    for folder in [*os.environ.get("PATH", "").split(os.pathsep), scripts_folder()]:
        path = shutil.which(name, path=folder) if folder else None
        if path is None:
            continue
        try:
            said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
        except OSError:
            continue
        number = re.search(r"\d+(?:\.\d+)+", said.stdout)
        # A cmake or ninja from PyPI that isolation cut off from its Python package does not run: it does not count.
        if said.returncode == 0 and number and _leading_numbers(number.group()) >= minimum:
            return Path(path)
    return None


def require_tool(name: str, minimum: tuple[int, ...]) -> Path:
    """The same, or a BuildError."""
    path = find_tool(name, minimum)
    if path is None:
        raise BuildError(f"no {name} >= {_dotted(minimum)} found on PATH: pip install {name}, or drop the build flag "
                         "that kept pip from installing it (--no-build-isolation).")  # fmt: skip
    return path


def require_compiler() -> Path:
    """The C++ compiler (CXX, else c++, g++, clang++ on PATH), tried on a small C++17 program, or a BuildError."""
    asked = os.environ.get("CXX")
    path = shutil.which(asked) if asked else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if path is None:
        tried = f"CXX={asked} is no program" if asked else "there is no c++, g++ or clang++ on PATH"
        raise BuildError(f"no C++ compiler found: {tried}; install one (Debian, Ubuntu: apt install g++) or set CXX.")
    program = "#include <optional>\n#include <vector>\nint main() { return std::optional<int>(0).value(); }\n"
    said = subprocess.run(
        [path, "-std=c++17", "-x", "c++", "-fsyntax-only", "-"], input=program, capture_output=True, text=True
    )
    if said.returncode != 0:
        why = (said.stderr.strip().splitlines() or ["no message"])[0]
        raise BuildError(f"the C++ compiler {path} cannot compile a small C++17 program ({why}).")
    return Path(path)


def require_python_header() -> Path:
    """The folder of Python.h, or a BuildError."""
    folder = Path(sysconfig.get_paths()["include"])
    if not (folder / "Python.h").is_file():
        short = _dotted(sys.version_info[:2])
        raise BuildError(
            f"Python.h of Python {short} is missing ({folder}): install Python's development files "
            f"(Debian, Ubuntu: apt install python{short}-dev)."
        )
    return folder


def find_nvcc() -> Path | None:
    """nvcc: of CUDA_HOME or CUDA_PATH if one is set, else on PATH, else in /usr/local/cuda."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            path = shutil.which("nvcc", path=os.path.join(os.environ[variable], "bin"))
            return Path(path) if path else None
    path = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return Path(path) if path else None


def decide_cuda(asked: str, nvcc: Path | None, torch: Torch) -> tuple[bool, str]:
    """Whether to build the CUDA op library, and why. `asked` is the value of FMD_EXT_CUDA: "0", "1" or "auto"."""
    if asked not in ("0", "1", "auto"):
        raise BuildError(f"FMD_EXT_CUDA={asked} is not understood: set it to 0, 1 or auto (the default).")
    if asked == "0":
        return False, "FMD_EXT_CUDA=0"
    if asked == "1":
        if nvcc is None:
            raise BuildError(
                "FMD_EXT_CUDA=1 asks for the CUDA library, but no nvcc was found in CUDA_HOME, on PATH or in "
                "/usr/local/cuda: install the CUDA toolkit, or set FMD_EXT_CUDA=0."
            )
        return True, f"FMD_EXT_CUDA=1, {nvcc}"
    if torch.cuda is None:
        return False, f"FMD_EXT_CUDA=auto, and the installed torch {torch.version} has no CUDA"
    if nvcc is None:
        return False, f"FMD_EXT_CUDA=auto, and no nvcc was found for torch {torch.version}"
    return True, f"FMD_EXT_CUDA=auto, {nvcc} and torch {torch.version} with CUDA {torch.cuda}"


def cmake_definitions(version: str) -> dict[str, str]:
    """Everything CMake is told, checked beforehand so that what is missing is one sentence."""
    compiler = require_compiler()
    require_python_header()
    torch = require_torch()
    nvcc = find_nvcc()
    cuda, reason = decide_cuda(os.environ.get("FMD_EXT_CUDA", "auto"), nvcc, torch)
    try:
        import pybind11
    except ImportError:
        raise BuildError("no pybind11 found: pip install pybind11, or build without --no-build-isolation.") from None
    definitions = {
        "CMAKE_BUILD_TYPE": os.environ.get("FMD_EXT_BUILD_TYPE", "Release"),
        "CMAKE_MAKE_PROGRAM": str(require_tool("ninja", MIN_NINJA)),
        "CMAKE_CXX_COMPILER": str(compiler),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "FMD_VERSION": version,
        "FMD_TORCH_DIR": str(torch.path),
        "FMD_TORCH_VERSION": torch.version,
        "FMD_TORCH_TARGET_VERSION": TORCH_TARGET_VERSION,
        "FMD_EXT_CUDA": "ON" if cuda else "OFF",
        "FMD_EXT_CUDA_REASON": reason,
    }
    if cuda:
        definitions["CMAKE_CUDA_COMPILER"] = str(nvcc)
    return definitions


def build_requirements() -> list[str]:
    """What pip has to bring for this build, over what pyproject.toml names. Raises BuildError where a build cannot
    succeed, before pip downloads anything."""
    require_compiler()
    require_python_header()
    torch = find_torch()
    if torch is not None:
        require_torch()
    nvcc = find_nvcc()
    decide_cuda(os.environ.get("FMD_EXT_CUDA", "auto"), nvcc, torch or Torch(Path(), "(not installed yet)", None))
    requirements = [] if torch else [f"torch>={_dotted(MIN_TORCH)}"]
    for name, minimum in (("cmake", MIN_CMAKE), ("ninja", MIN_NINJA)):
        if find_tool(name, minimum) is None:
            requirements.append(f"{name}>={_dotted(minimum)}")
    return requirements


def get_requires_for_build_wheel(config_settings=None):
    ours = build_requirements()  # first: what is missing is then the only thing that is printed
    return _setuptools_hooks.get_requires_for_build_wheel(config_settings) + ours


def get_requires_for_build_editable(config_settings=None):
    ours = build_requirements()  # first: what is missing is then the only thing that is printed
    return _setuptools_hooks.get_requires_for_build_editable(config_settings) + ours


if platform.system() != "Linux":
    raise BuildError(f"builds on Linux only so far, not on {platform.system()}.")

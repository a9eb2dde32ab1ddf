"""What a build decides before CMake runs: whether to compile, with which tools, against which torch, with CUDA or not.

One place decides: the build backend, `setup.py` and the scripts ask here. Only the standard library is needed. Torch is
never imported, its version is read from `torch/version.py`.

The extension is built against the torch that is already installed, under build isolation too. pip takes the
environment's folders off `sys.path`, but `sysconfig` still names them. Other tools build in a temporary environment:
the installed torch is then looked for in the environment that the tool names.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

MIN_TORCH = (2, 10)
MIN_CMAKE = (3, 24)
MIN_NINJA = (1, 10)
# What the op libraries may use of torch: the stable ABI as of 2.10, so that every later torch loads them.
TORCH_TARGET_VERSION = "0x020a000000000000"
# What a build that compiled nothing leaves in the package, for `fmd_ext` to read: {"compiled": false, "reason": "..."}.
UNCOMPILED_FACTS = "_build_info.json"
WITHOUT_COMPILING = "FMD_EXT_BUILD=python installs without the compiled ops"


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


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def leading_numbers(text: str) -> tuple[int, ...]:
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


def is_pip() -> bool:
    """Whether this is pip's build isolation, which runs the Python of the environment that is installed into."""
    return any("pip-build-env-" in entry for entry in sys.path)


def named_environments() -> list[Path]:
    """Where this build runs in a temporary environment: the environments that its tool names as the user's, first the
    one that `python -m build` was run from, then the activated one. Empty for any other build."""
    here = Path(sys.prefix)
    temporary = Path(tempfile.gettempdir()) in here.parents or "builds-v0" in here.parts  # the latter: uv's cache
    if is_pip() or not temporary:
        return []
    config = here / "pyvenv.cfg"
    maker = re.search(r"(?m)^command\s*=\s*(.+?) -m venv\b", config.read_text()) if config.is_file() else None
    named = [Path(maker[1]).parents[1]] if maker else []
    named += [Path(os.environ[name]) for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if os.environ.get(name)]
    return [folder for folder in dict.fromkeys(named) if folder != here]


def packages_of(environment: Path) -> list[Path]:
    """The folders that hold the packages of another environment."""
    return sorted(environment.glob("lib*/python3*/site-packages"))


def find_torch(folders: list[Path] | None = None) -> Torch | None:
    """The installed torch, or None. Raises BuildError if it is older than 2.10."""
    if folders is None:
        folders = search_folders() + [folder for named in named_environments() for folder in packages_of(named)]
    for folder in folders:
        version_file = folder / "torch" / "version.py"
        if not version_file.is_file():
            continue
        text = version_file.read_text()
        version = re.search(r"(?m)^__version__\s*=\s*['\"]([^'\"]+)['\"]", text)
        if not version:
            raise BuildError(f"{version_file} names no version: the installed torch is damaged, reinstall it.")
        if leading_numbers(version[1])[:2] < MIN_TORCH:
            raise BuildError(
                f"the installed torch is {version[1]} ({folder / 'torch'}), but fmd_ext needs torch >= "
                f"{dotted(MIN_TORCH)}: upgrade torch first."
            )
        cuda = re.search(r"(?m)^cuda\b[^=]*=\s*['\"]([^'\"]+)['\"]", text)
        return Torch(folder / "torch", version[1], cuda[1] if cuda else None)
    return None


def require_torch() -> Torch:
    """The installed torch with its headers, or a BuildError."""
    torch = find_torch()
    if torch is None:
        raise BuildError(
            f"no torch is installed for {sys.executable}. Where that is a temporary environment of the build tool: "
            f"install torch >= {dotted(MIN_TORCH)}, 'setuptools>=77', pybind11, cmake and ninja in yours and build "
            "without isolation (uv pip, pip: --no-build-isolation; python -m build: --no-isolation). Otherwise install "
            "torch first."
        )
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
        if said.returncode == 0 and number and leading_numbers(number.group()) >= minimum:
            return Path(path)
    return None


def require_tool(name: str, minimum: tuple[int, ...]) -> Path:
    """The same, or a BuildError."""
    path = find_tool(name, minimum)
    if path is None:
        raise BuildError(f"no {name} >= {dotted(minimum)} found on PATH: pip install {name}, or drop the build flag "
                         "that kept pip from installing it (--no-build-isolation).")  # fmt: skip
    return path


@dataclass(frozen=True)
class Compiler:
    """The C++ compiler: the program, what runs it (such as ccache), and the flags that CXX gives."""

    program: str
    launchers: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        return [*self.launchers, self.program, *self.flags]


def find_compiler() -> Compiler | None:
    """CXX, else c++, g++ or clang++ on PATH; None where there is none of these.

    CXX is a program, or as for make and CMake a command: launchers, the compiler, its flags ("ccache g++ -m64"). Raises
    BuildError if it names what is no program.
    """
    asked = os.environ.get("CXX", "").strip()
    if not asked:
        found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
        return Compiler(found) if found else None
    whole = shutil.which(asked)  # a path with spaces in it, too
    words = [asked] if whole else shlex.split(asked)
    flags = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    programs = [shutil.which(word) for word in words[:flags]]
    if not programs or None in programs:
        wrong = words[programs.index(None)] if programs else asked
        raise BuildError(f"no C++ compiler found: CXX={asked}, but {wrong} is no program; set CXX to one, or unset it.")
    return Compiler(programs[-1], tuple(programs[:-1]), tuple(words[flags:]))


def require_compiler() -> Compiler:
    """The C++ compiler, tried on a small C++17 program, or a BuildError."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(
            "no C++ compiler found: there is no c++, g++ or clang++ on PATH; install one (Debian, Ubuntu: "
            "apt install g++) or set CXX."
        )
    program = "#include <optional>\n#include <vector>\nint main() { return std::optional<int>(0).value(); }\n"
    said = subprocess.run(
        [*compiler.command, "-std=c++17", "-x", "c++", "-fsyntax-only", "-"],
        input=program,
        capture_output=True,
        text=True,
    )
    if said.returncode != 0:
        why = (said.stderr.strip().splitlines() or ["no message"])[0]
        raise BuildError(
            f"the C++ compiler {shlex.join(compiler.command)} cannot compile a small C++17 program ({why}); "
            f"{WITHOUT_COMPILING}."
        )
    return compiler


def require_python_header() -> Path:
    """The folder of Python.h, or a BuildError."""
    folder = Path(sysconfig.get_paths()["include"])
    if not (folder / "Python.h").is_file():
        short = dotted(sys.version_info[:2])
        raise BuildError(
            f"Python.h of Python {short} is missing ({folder}): install Python's development files "
            f"(Debian, Ubuntu: apt install python{short}-dev); {WITHOUT_COMPILING}."
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


def decide_compiled() -> tuple[bool, str]:
    """Whether to compile, and why not. FMD_EXT_BUILD: "compiled", "python", or "auto", which compiles on Linux wherever
    there is a C++ compiler, working or not: one that does not work is an error that its user wants to know of."""
    asked = os.environ.get("FMD_EXT_BUILD", "auto")
    if asked not in ("auto", "compiled", "python"):
        raise BuildError(f"FMD_EXT_BUILD={asked} is not understood: set it to compiled, python or auto (the default).")
    if asked == "python":
        return False, "FMD_EXT_BUILD=python"
    if platform.system() != "Linux":
        if asked == "compiled":
            raise BuildError(f"FMD_EXT_BUILD=compiled, but the ops compile on Linux only, not on {platform.system()}.")
        return False, f"the ops compile on Linux only, and this is {platform.system()}"
    if asked == "auto" and find_compiler() is None:
        return False, "no C++ compiler was found: there is no c++, g++ or clang++ on PATH, and CXX is not set"
    return True, ""


def leave_uncompiled(package: Path, reason: str) -> None:
    """Makes the package folder one without compiled parts, says so in one line, and notes the reason there."""
    remove_compiled(package)
    package.mkdir(parents=True, exist_ok=True)
    facts = {"compiled": False, "reason": reason}
    (package / UNCOMPILED_FACTS).write_text(json.dumps(facts) + "\n")
    print(f"fmd_ext: warning: nothing is compiled, torch's own attention will serve: {reason}.", file=sys.stderr)


def remove_compiled(package: Path) -> None:
    """Takes away what an earlier build with other settings left. A library in use is not written over."""
    shutil.rmtree(package / "lib", ignore_errors=True)
    (package / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}").unlink(missing_ok=True)
    (package / UNCOMPILED_FACTS).unlink(missing_ok=True)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
        "CMAKE_CXX_COMPILER": compiler.program,
        "CMAKE_CXX_COMPILER_LAUNCHER": ";".join(compiler.launchers),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "FMD_VERSION": version,
        "FMD_TORCH_DIR": str(torch.path),
        "FMD_TORCH_VERSION": torch.version,
        "FMD_TORCH_TARGET_VERSION": TORCH_TARGET_VERSION,
        "FMD_EXT_CUDA": "ON" if cuda else "OFF",
        "FMD_EXT_CUDA_REASON": reason,
    }
    if compiler.flags:  # before those of CXXFLAGS, which CMake would otherwise read by itself
        # The space: CMake would take off quotes that enclose the whole value.
        definitions["CMAKE_CXX_FLAGS"] = f" {shlex.join(compiler.flags)} {os.environ.get('CXXFLAGS', '')}"
    if cuda:
        definitions["CMAKE_CUDA_COMPILER"] = str(nvcc)
    return definitions


def build_requirements() -> list[str]:
    """What the installer has to bring for this build, over what pyproject.toml names. Raises BuildError where a build
    cannot succeed, before anything is downloaded."""
    compiled, _ = decide_compiled()
    if not compiled:
        return []
    require_compiler()
    require_python_header()
    # pip's isolation shows what is installed, so that torch is then missing and will be installed anyway. A temporary
    # environment does not: a torch for the build alone would be several gigabytes, and perhaps not the user's.
    torch = find_torch() if is_pip() else require_torch()
    if torch is not None:
        require_torch()
    nvcc = find_nvcc()
    decide_cuda(os.environ.get("FMD_EXT_CUDA", "auto"), nvcc, torch or Torch(Path(), "(not installed yet)", None))
    requirements = [] if torch else [f"torch>={dotted(MIN_TORCH)}"]
    for name, minimum in (("cmake", MIN_CMAKE), ("ninja", MIN_NINJA)):
        if find_tool(name, minimum) is None:
            requirements.append(f"{name}>={dotted(minimum)}")
    return requirements

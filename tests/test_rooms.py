"""The order of rooms: which part of the package may import which, read off every import statement."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest

from paths import ROOT

PACKAGE = ROOT / "fmd_ext"
# By room, the rooms that it may import besides itself. The modules at the package's root are a room, "".
ROOT_MODULES = ""
MAY_IMPORT = {
    "": {"patching", "cli"},  # names that users import, at first use; `python -m fmd_ext`
    "ops": {""},
    "engine": {"", "ops"},
    "decode": {"", "ops", "engine"},
    "adapters": {""},
    "patching": {"", "ops", "engine", "decode", "adapters", "inputs"},
    "inputs": {""},
    "models": {"", "adapters", "inputs"},
    "serve": {"", "ops", "engine", "adapters", "inputs", "models"},
    "cli": {"", "ops", "engine", "decode", "adapters", "patching", "inputs", "models", "serve"},
    "lab": {"", "ops", "engine", "decode", "adapters", "patching", "inputs", "models", "serve", "cli"},
}
# What the reference may know: the adapter says where a model keeps what it recomputes. No other module of the engine.
REFERENCE = PACKAGE / "engine" / "reference.py"


def room_of(name: str) -> str:
    """The room of a module ``fmd_ext.…``: a folder of the package, or its root."""
    first = name.split(".")[1] if "." in name else ""
    return first if (PACKAGE / first).is_dir() and first else ROOT_MODULES


def imports_of(path):
    """Full names of what a file of the package imports from the package, relative imports resolved."""
    package = ["fmd_ext", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name == "fmd_ext" or name.startswith("fmd_ext."))


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_folder_is_a_room_with_a_place_in_the_order():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and list(path.glob("*.py"))}
    assert folders == MAY_IMPORT.keys() - {ROOT_MODULES}


def test_the_rooms_are_those_of_the_design():
    rooms = set(re.findall(r"(?m)^\| `fmd_ext/(\w+)/` \|", (ROOT / "docs" / "design.md").read_text()))
    assert rooms == MAY_IMPORT.keys() - {ROOT_MODULES}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_keep_the_order(room):
    files = [path for path in FILES if room_of(".".join(("fmd_ext", *path.relative_to(PACKAGE).parts))) == room]
    assert files
    known = MAY_IMPORT[room] | {room}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        if path != REFERENCE
        for name in imports_of(path)
        if room_of(name) not in known
    ]
    assert wrong == []


def test_the_reference_knows_nothing_of_what_it_checks():
    known = {room_of(name) for name in imports_of(REFERENCE)}
    assert known <= {"", "adapters"}, sorted(imports_of(REFERENCE))


def test_the_order_has_no_circle():
    """A room may not reach itself through others. Of the root's modules only those that hand out names look down."""
    below = {room: known - {ROOT_MODULES} for room, known in MAY_IMPORT.items() if room}
    while below:
        free = [room for room, known in below.items() if not known & below.keys()]
        assert free, f"a circle among {sorted(below)}"
        for room in free:
            del below[room]


def test_imports_are_found():
    """The reading of imports itself: absolute, relative and nested ones."""
    found = set(imports_of(PACKAGE / "lab" / "bench" / "plans.py"))
    assert {"fmd_ext.engine.cache.BranchedState", "fmd_ext.lab.bench.workload.Workload"} <= found
    assert room_of("fmd_ext.lab.bench.workload.Workload") == "lab" and room_of("fmd_ext.config.FMDConfig") == ""


def test_patching_loads_nothing_of_the_lab():
    code = (
        "import sys, fmd_ext; fmd_ext.patch, fmd_ext.FMDConfig;"
        "print([name for name in sys.modules if (name + '.').startswith('fmd_ext.lab.')])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.strip() == "[]"


# What takes seconds to import, and what decodes clips.
HEAVY = {"torch", "transformers", "torchvision", "scipy", "av", "huggingface_hub", "matplotlib", "vllm"}
HELP = "import contextlib, fmd_ext.cli\nwith contextlib.suppress(SystemExit): fmd_ext.cli.main([{}'--help'])"
LIGHT = {
    "import fmd_ext": "import fmd_ext",
    "settings": "import fmd_ext; fmd_ext.FMDConfig(alpha=0.9)",
    "fmd-ext --help": HELP.format(""),
    "fmd-ext ask --help": HELP.format("'ask', "),
    "fmd-ext eval --help": HELP.format("'eval', "),
    "fmd-ext curves": "import fmd_ext.lab.cli.curves",
    "fmd-ext compare": "import fmd_ext.lab.cli.compare",
    "benchmarks and methods": "import fmd_ext.lab.eval.benchmarks, fmd_ext.lab.eval.methods",
}


@pytest.mark.parametrize("code", LIGHT.values(), ids=list(LIGHT))
def test_what_needs_no_model_imports_none(code):
    found = f"import sys; print('loaded', sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{found}"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded []"

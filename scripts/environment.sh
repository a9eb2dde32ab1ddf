# Sourced by the scripts beside it: a virtual environment in .venv with fmd_ext and everything it needs, and $python, its
# interpreter. FMD_EXT_VENV: another folder for it. PYTHON: another interpreter than python3 to make it with.
# FMD_EXT_PYTHON: an interpreter whose environment is used as it is. Nothing is installed then, as on a machine without a
# network; only the extension is built, in this folder. FMD_EXT_CUDA, FMD_EXT_BUILD: see docs/installing.md.

venv="${FMD_EXT_VENV:-.venv}"
python="${FMD_EXT_PYTHON:-$venv/bin/python}"

die() {
  echo "fmd_ext: $*" >&2
  exit 1
}

# quietly WHAT COMMAND...: says WHAT, and of what the command says nothing but where it fails.
quietly() {
  local what="$1" said status=0
  shift
  echo "fmd_ext: $what"
  said="$("$@" 2>&1)" || status=$?
  if ((status)); then
    echo "$said" >&2
    die "$what: failed, as told above"
  fi
}

check_python() {
  local python="$1"
  command -v "$python" >/dev/null || die "no $python found: install Python 3.10 or newer, or set PYTHON."
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "$("$python" --version 2>&1) is too old: Python 3.10 or newer is needed; set PYTHON to one."
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    die "$python cannot make virtual environments: install its venv module (Debian, Ubuntu: apt install python3-venv)."
}

# What the built extension depends on: when none of it has changed, there is nothing to install again.
fingerprint() {
  find csrc python build_backend CMakeLists.txt setup.py pyproject.toml constraints.txt -type f \
    -not -path '*/__pycache__/*' -print0 | sort -z | xargs -0 sha256sum
  echo "cuda ${FMD_EXT_CUDA:-auto} build ${FMD_EXT_BUILD:-auto} compiler ${CXX:-$(command -v c++ g++ clang++ | head -1)}"
}

is_built() { # STAMP: whether what it says is what was built; without a compiler that is a note of the reason
  [[ -f "$1" && "$(cat "$1")" == "$(fingerprint)" ]] &&
    { compgen -G 'fmd_ext/_core.*.so' || [[ -f fmd_ext/_build_info.json ]]; } >/dev/null
}

make_venv() { # $venv, if it is not there yet
  if [[ -x "$venv/bin/pip" ]]; then return; fi
  check_python "${PYTHON:-python3}"
  echo "fmd_ext: making a virtual environment in $venv"
  "${PYTHON:-python3}" -m venv "$venv"
}

# make_environment EXTRAS: EXTRAS is "" or, for example, "[omni,test]".
make_environment() {
  local extras="$1"
  if [[ -n "${FMD_EXT_PYTHON:-}" ]]; then
    build_in_place
    return
  fi
  make_venv
  local stamp="$venv/fmd_ext_installed$extras"
  if is_built "$stamp"; then return; fi
  rm -f "$stamp"
  # torch first: the extension is then built against this one, and pip brings no second one for the build.
  quietly "installing torch, if it is not there yet (a few minutes)" \
    "$python" -m pip install --constraint constraints.txt torch
  # Editable: what runs is this folder, also under `python -m fmd_ext.…` started in it.
  quietly "building the extension, installing it and what it needs (a few minutes)" \
    "$python" -m pip install --constraint constraints.txt --editable ".$extras"
  say_what_was_built
  echo "fmd_ext: the command line is $venv/bin/fmd-ext"
  fingerprint >"$stamp"
}

build_in_place() {
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
  # Of this interpreter alone: the extension module is another one for each Python.
  local stamp="build/in_place_$("$python" -c 'import sys; print(sys.implementation.cache_tag)')"
  if is_built "$stamp"; then return; fi
  mkdir -p build
  "$python" setup.py --quiet build_ext --inplace --build-temp build/in_place
  say_what_was_built
  fingerprint >"$stamp"
}

say_what_was_built() {
  "$python" - <<'PYTHON'
import json
import pathlib

import fmd_ext

note = pathlib.Path(fmd_ext.__file__).with_name("_build_info.json")
if note.is_file():
    reason = json.loads(note.read_text())["reason"]
    print(f"fmd_ext: nothing is compiled, torch's own attention serves: {reason}")
else:
    from fmd_ext import _core

    facts = _core.build_info()
    built = "built" if facts["cuda"] else "not built"
    print(f"fmd_ext: extension built with {facts['compiler']} against torch {facts['torch_version']}")
    print(f"fmd_ext: CPU variants {', '.join(facts['isa_variants'])}; CUDA library {built} ({facts['cuda_reason']})")
PYTHON
}

"""Which CUDA kernels have passed on a device, and that the build and the choice go by it."""

from __future__ import annotations

import json
import shutil
from itertools import groupby

import pytest
from test_cuda_build import LIBRARY, LOAD_FOR_CUDA, said_with_cuda_library

import fmd_kernel_sources as sources
from fmd_ext import ops
from fmd_ext.cli.doctor_ops import in_words
from fmd_ext.ops.library import CudaKernel
from paths import ROOT

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="this installation has no CUDA op library")


@pytest.fixture
def tree(tmp_path):
    """A copy of what digests are made of."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    return tmp_path


def test_every_op_has_a_kernel_whose_present_source_has_passed():
    """A kernel that ran on a device is not rewritten in place: the new one gets a name of its own. If a change does not
    reach the machine code, scripts/same_machine_code shows it and moves the record."""
    by_op = {op: list(kernels) for op, kernels in groupby(sources.kernels(), lambda kernel: kernel.op)}
    assert by_op.keys() == set(ops.__all__)
    for op, kernels in by_op.items():
        assert any(kernel.passed_on and kernel.capability == 0 for kernel in kernels), op


def test_every_source_of_kernels_is_listed():
    listed = {kernel.source for kernel in sources.kernels()}
    there = {str(path.relative_to(ROOT)) for folder in ("sm80", "sm90") for path in
             (ROOT / "csrc" / "cuda" / folder).glob("*.cu")}  # fmt: skip
    assert there - listed == {"csrc/cuda/sm80/clear.cu"}  # a helper of both attention ops
    assert listed <= there


def test_a_digest_is_of_code_alone(tree):
    source, header = "csrc/cuda/sm80/merge.cu", tree / "csrc/include/fmd/types.h"
    before = sources.digest(source, tree)
    header.write_text("// A remark.\n\n" + header.read_text().replace("\n", "  \n"))
    assert sources.digest(source, tree) == before == sources.digest(source)
    header.write_text(header.read_text() + "constexpr int kAnother = 1;\n")
    assert sources.digest(source, tree) != before


def test_what_passed_counts_until_the_source_changes(tree):
    newest = next(kernel for kernel in sources.kernels(tree) if kernel.name == "persistent")
    sources.record([newest], "some GPU", tree)
    assert {k.name: k.passed_on for k in sources.kernels(tree)}["persistent"] == "some GPU"
    assert '"some GPU", 0)' in sources.header(tree)
    table = json.loads(sources.table_path(tree).read_text())
    others = json.loads(sources.table_path().read_text())
    assert table["branched_decode"][0] == others["branched_decode"][0] and table["append_"] == others["append_"]
    header = tree / "csrc/cuda/sm80/persistent_decode.cuh"
    header.write_text(header.read_text().replace("kFixedTiles = 16", "kFixedTiles = 8"))
    assert {k.name: k.passed_on for k in sources.kernels(tree)}["persistent"] == ""


def test_a_record_that_was_moved_says_so(tree):
    kernel = next(kernel for kernel in sources.kernels(tree) if kernel.name == "persistent")
    sources.record([kernel], "some GPU", tree, machine_code_of="abc1234")
    passed_on = {k.name: k.passed_on for k in sources.kernels(tree)}["persistent"]
    assert passed_on == "some GPU as this machine code, that of abc1234; its host code has changed since"


def test_a_header_that_is_not_there_is_named(tree):
    (tree / "csrc/cuda/dispatch.h").unlink()
    with pytest.raises(FileNotFoundError, match="merge.cu includes cuda/dispatch.h, which is not in csrc or csrc/incl"):
        sources.digest("csrc/cuda/sm80/merge.cu", tree)


@needs_library
def test_the_library_was_built_from_these_sources(tmp_path):
    code = LOAD_FOR_CUDA + (
        "library._cuda = library._cuda_functions(sys.argv[2])\n"
        "for kernel in library.cuda_kernels():\n"
        "    print(kernel.op, kernel.name, kernel.capability, kernel.sources, kernel.passed_on, sep='|')\n"
    )
    want = [f"{k.op}|{k.name}|{k.capability}|{k.sources}|{k.passed_on}" for k in sources.kernels()]
    assert said_with_cuda_library(code, tmp_path).splitlines() == want


@needs_library
def test_auto_is_the_newest_kernel_that_has_passed_and_fits(tmp_path):
    code = LOAD_FOR_CUDA + (
        "library._cuda = library._cuda_functions(sys.argv[2])\n"
        "for op in sorted({kernel.op for kernel in library.cuda_kernels()}):\n"
        "    print(op, library.cuda_kernel(op, (9, 0)), library.cuda_kernel(op, (8, 6)))\n"
    )
    want = []
    for op in sorted(ops.__all__):
        kernels = [kernel for kernel in sources.kernels() if kernel.op == op and kernel.passed_on]
        fitting = [[kernel.name for kernel in kernels if kernel.capability in (0, device)] for device in (90, 86)]
        want.append(f"{op} {fitting[0][-1]} {fitting[1][-1]}")
    assert said_with_cuda_library(code, tmp_path).splitlines() == want


@needs_library
def test_kernels_are_chosen_by_name(tmp_path):
    code = LOAD_FOR_CUDA + (
        "library._cuda = library._cuda_functions(sys.argv[2])\n"
        "for op, name in (('branched_prefill', 'sm90'), ('branched_prefill', 'sm80'), ('append_', 'wide'),\n"
        "                 ('branched_decode', 'sm70'), ('attention', 'auto')):\n"
        "    try:\n"
        "        library.select_cuda_kernel(op, name)\n"
        "        print(op, library.cuda_kernel(op, (9, 0)), library.cuda_kernel(op, (8, 0)))\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )
    assert said_with_cuda_library(code, tmp_path).splitlines() == [
        "branched_prefill sm90 sm90",
        "branched_prefill sm80 sm80",
        "append_ wide wide",
        "unknown CUDA kernel 'sm70' of branched_decode; accepted: auto, split, persistent",
        "unknown op 'attention'; accepted: branched_prefill, branched_decode, append_, rope_append_, merge_",
    ]


def test_doctor_tells_what_has_not_run():
    kernels = [CudaKernel("op_", "old", 0, "", "a GPU"), CudaKernel("op_", "new", 90, "", "")]
    assert in_words(kernels, "old") == (
        "its present source has passed on a GPU; the source of the newer new, for compute capability 9.0, has not been "
        "run on a device: FMD_EXT_CUDA_KERNELS=op_=new chooses it"
    )
    assert in_words(kernels, "new") == "its present source has not been run on a device"

"""What the compiler makes of the CUDA kernels. Needs nvcc, and no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_build import script

import fmd_build_tools as tools
import fmd_ext
from fmd_ext import ops
from paths import ROOT

LIBRARY = Path(fmd_ext.__file__).parent / "lib" / "libfmd_ext_cuda.so"
SCRIPT = ROOT / "scripts" / "ptxas_report.py"
ATTENTION_KERNELS = (
    "branched_prefill",
    "branched_decode",
    "branched_decode_combine",
    "persistent_decode",
    "persistent_combine",
)
needs_nvcc = pytest.mark.skipif(tools.find_nvcc() is None, reason="no nvcc: the CUDA kernels cannot be compiled")


@needs_nvcc
def test_no_kernel_spills_registers():
    said = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr
    kernels = {tuple(line.split(maxsplit=1)) for line in said.stdout.splitlines()[1:]}
    for architecture in ("80", "90a"):
        for kernel in ATTENTION_KERNELS:
            for arguments in ("BFloat16, 64", "BFloat16, 128", "Float16, 64", "Float16, 128"):
                name = f"{kernel}_kernel<{arguments}> "
                assert any(arch == architecture and rest.startswith(name) for arch, rest in kernels), (
                    architecture,
                    name,
                )
    assert sum(arch == "90a" and rest.startswith("sm90_branched_prefill_kernel<") for arch, rest in kernels) == 4


@needs_nvcc
def test_a_spill_is_seen(tmp_path):
    source = tmp_path / "spilling.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) spilling_kernel(float* x) {\n"
        "  float v[96];\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 96; ++i) v[i] = x[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "#pragma unroll\n"
        "  for (int i = 0; i < 96; ++i) x[i * 7 + threadIdx.x] = v[i] * v[95 - i];\n"
        "}\n"
    )
    [(_, registers, spills, stack)] = script("ptxas_report").report(str(tools.find_nvcc()), source, "80")
    assert registers <= 32 and spills > 0 and stack > 0


LOAD_FOR_CUDA = """
import sys, ctypes, torch
from fmd_ext.ops import library
library.load()
if torch.version.cuda is None:
    ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
    torch.ops.load_library(sys.argv[2])
"""


def said_with_cuda_library(code, folder):
    """What a program prints that begins with LOAD_FOR_CUDA.

    A torch without CUDA has no libtorch_cuda.so, from which the library needs one function: a stub takes its place.
    """
    stub = folder / "libtorch_cuda.so"
    source = folder / "stub.cpp"
    source.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n')
    compiler = tools.require_compiler().command
    subprocess.run([*compiler, "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", source, "-o", stub], check=True)
    said = subprocess.run([sys.executable, "-c", code, stub, LIBRARY], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return said.stdout


@pytest.mark.skipif(not LIBRARY.exists(), reason="this installation was built without the CUDA op library")
def test_the_library_implements_all_ops(tmp_path):
    code = LOAD_FOR_CUDA + (
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith('fmd_ext::')]\n"
        "for device in ('CPU', 'CUDA'):\n"
        "    print(*sorted(name for name in names if has(name, device)))\n"
    )
    for_cpu, for_cuda = (line.split() for line in said_with_cuda_library(code, tmp_path).splitlines())
    assert for_cuda == for_cpu == [f"fmd_ext::{name}" for name in sorted(ops.__all__)]

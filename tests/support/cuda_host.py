"""Executes the CUDA launchers and kernels of csrc/cuda on the CPU, under AddressSanitizer and UBSan.

The sources are compiled as plain C++ over cuda_host/intrinsics.h, together with a driver that takes calls from stdin.
The driver is compiled again only when a source has changed.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import hashlib
import os
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import fmd_kernel_sources
from paths import ROOT, TESTS

WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]  # unroll
FLAGS = ["-std=c++17", "-g1", "-fno-omit-frame-pointer", *WARNINGS]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# Kernels and launchers are instrumented. The scheduler and the tensor core are not, which makes the tests eight times
# faster: what they touch for a kernel, the kernel's side of the layer has touched before.
INSTRUMENTED, PLAIN = ["-O1", *SANITIZERS], ["-O2"]
DRIVER = ("driver.cpp", "small_kernels.cpp")
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PREFILL, DECODE, APPEND, MERGE, FAULT, ROPE_APPEND, FAULT_SM90, FRAGMENTS, FAULT_GRIDS, END = *range(9), -1


def sources() -> list[tuple[Path, list[str]]]:
    """Sources with their flags, the ones that take longest first."""
    kernels = (ROOT / "csrc" / "cuda").rglob("*.cu")
    attention_first = sorted(kernels, key=lambda path: (not path.with_suffix(".cuh").exists(), path))
    emulator = sorted((TESTS / "support" / "cuda_host").glob("*.cpp"))
    instrumented = [*attention_first, *(path for path in emulator if path.name in DRIVER)]
    plain = [path for path in emulator if path.name not in DRIVER]
    return [(path, INSTRUMENTED) for path in instrumented] + [(path, PLAIN) for path in plain]


def build_driver() -> Path:
    """Path of the driver program; what has not changed is not compiled again (all: half a minute on two cores)."""
    folder = ROOT / "build" / "cuda_host"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes share the driver: the first builds it, the others wait
        return _compile(os.environ.get("CXX") or "c++", folder)


def _compile(compiler: str, folder: Path) -> Path:
    """The driver in `folder`, which keeps the objects of this state of the sources and no others."""
    folders = [ROOT / "csrc" / "cuda", ROOT / "csrc" / "include", TESTS / "support" / "cuda_host"]
    headers = {path for folder in folders for path in folder.rglob("*.*h") if path.is_file()}
    include = [part for folder in ("csrc", "csrc/include", "tests/support") for part in ("-I", ROOT / folder)]
    include += ["-I", folder]
    # None has passed anywhere here, so that "auto" is the oldest of each op whatever the table says.
    facts = re.sub(r'"[^"]*", (\d+\))', r'"", \1', fmd_kernel_sources.header())
    (folder / "generated").mkdir(exist_ok=True)
    (folder / "generated" / "cuda_kernels.inc").write_text(facts)
    headers_digest = hashlib.sha256(compiler.encode() + facts.encode())
    for path in sorted(headers):
        headers_digest.update(path.name.encode() + path.read_bytes())

    def build(target, *command):
        # Under another name first: an interrupted build leaves nothing that looks whole.
        if not target.exists():
            part = target.with_suffix(".part")
            said = subprocess.run([compiler, *FLAGS, *map(str, command), "-o", part], capture_output=True, text=True)
            if said.returncode != 0:
                raise RuntimeError(f"{' '.join(map(str, command))}:\n{said.stderr}")
            part.rename(target)
        return target

    def compile_one(source_and_flags):
        source, flags = source_and_flags
        digest = headers_digest.copy()
        digest.update(repr((FLAGS, flags)).encode() + source.read_bytes())
        target = folder / f"{source.name}-{digest.hexdigest()[:16]}.o"
        return build(target, *flags, *include, "-x", "c++", "-c", source)

    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, sources()))
    linked = hashlib.sha256(repr(objects).encode()).hexdigest()[:16]
    driver = build(folder / f"driver-{linked}.bin", *SANITIZERS, *objects)
    for path in set(folder.iterdir()) - {driver, folder / "lock", folder / "generated", *objects}:
        path.unlink() if path.is_file() else shutil.rmtree(path)
    return driver


def _storage(tensor):
    """The whole memory that a tensor is a view of."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


@dataclass
class Calls:
    """Calls for one run of the driver. The methods add a call; `run()` gives the results, one list of tensors per call.

    seed: order of warps and lanes, 0 = ascending. multiprocessors: of the imagined device, decides about splits.
    """

    parts: list[bytes] = field(default_factory=list)
    results: list[list[torch.Tensor]] = field(default_factory=list)

    def _numbers(self, *values):
        self.parts.append(struct.pack(f"<{len(values)}q", *values))

    def _float(self, value):
        self._numbers(struct.unpack("<I", struct.pack("<f", value))[0])

    def _array(self, tensor):
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() > 0 else b""
        self._numbers(len(data))
        self.parts.append(data)

    def _strided(self, tensor, *dims):
        """The memory that a tensor spans, the byte offset of its first element there, and strides."""
        self._array(_storage(tensor))
        self._numbers(tensor.storage_offset() * tensor.element_size(), *(tensor.stride(dim) for dim in dims))

    def _call(self, kind, seed, multiprocessors, *results):
        self._numbers(kind, seed, multiprocessors)
        self.results.append(list(results))

    def _kernel(self, name):
        self._array(torch.tensor(list(name.encode()), dtype=torch.uint8))

    def attention(
        self,
        case,
        decode=False,
        return_lse=True,
        seed=0,
        multiprocessors=2,
        head_distance=0,
        kernel="auto",
        capability=90,
        fixed_split=False,
    ):
        """(out, lse), as the op gives them.

        head_distance: puts the heads of k and v that many elements apart. kernel: its name in csrc/cuda/kernels.json.
        capability: of the imagined device.
        """
        num_rows, num_qo_heads, head_dim = case.q.shape
        # What no kernel writes stays NaN.
        out = torch.full(case.q.shape, float("nan"), dtype=case.q.dtype)
        lse = torch.full((num_rows, num_qo_heads) if return_lse else (0,), float("nan"))
        self._call(DECODE if decode else PREFILL, seed, multiprocessors, out, lse)
        num_kv_heads, num_slots, _ = case.k.shape
        self._numbers(DTYPE_CODES[case.q.dtype], num_rows, num_slots, num_qo_heads, num_kv_heads, head_dim)
        self._numbers(len(case.key_ranges), len(case.qo_rows), 1 if decode else case.max_qo_len)
        self._float(case.scale)
        for tensor, dims in ((case.q, (0, 1)), (case.k, (0, 1)), (case.v, (0, 1))):
            self._strided(tensor, *dims)
        for tensor in (case.qo_rows, case.cu_seqlens_q, case.key_ranges, out, lse):
            self._array(tensor)
        self._numbers(return_lse, head_distance)
        self._kernel(kernel)
        self._numbers(capability, fixed_split)

    def append(self, k_pool, v_pool, k, v, slots, seed=0, kernel="auto", head_distance=0):
        """The memory of k_pool and v_pool afterwards, all that their storage holds, as one row.

        head_distance: puts the heads of both that many elements apart while the kernel runs; then both must be
        contiguous.
        """
        self._call(APPEND, seed, 2, *(_storage(pool) for pool in (k_pool, v_pool)))
        self._kernel(kernel)
        self._appended(k_pool, v_pool, k, v, slots, head_distance)

    def _appended(self, k_pool, v_pool, k, v, slots, head_distance=0):
        self._numbers(DTYPE_CODES[k_pool.dtype], k.shape[0], k_pool.shape[1], k_pool.shape[0], k_pool.shape[2])
        for tensor in (k_pool, v_pool, k, v):
            self._strided(tensor, 0, 1)
        self._array(slots)
        self._numbers(head_distance)

    def rope_append(self, k_pool, v_pool, q_out, q, k, v, cos, sin, slots, seed=0, kernel="auto", head_distance=0):
        """The memory of q_out, k_pool and v_pool afterwards; all three must be contiguous. head_distance: as there."""
        self._call(ROPE_APPEND, seed, 2, q_out, k_pool, v_pool)
        self._kernel(kernel)
        self._appended(k_pool, v_pool, k, v, slots, head_distance)
        self._numbers(q.shape[1], DTYPE_CODES[cos.dtype])
        for tensor in (q, q_out):
            self._strided(tensor, 0, 1)
        for tensor in (cos, sin):
            self._strided(tensor, 0)

    def merge(self, hidden, home_rows, away_rows, weights, seed=0):
        """The memory of hidden afterwards; it must be contiguous."""
        self._call(MERGE, seed, 2, hidden)
        self._numbers(DTYPE_CODES[hidden.dtype], *hidden.shape, len(home_rows))
        self._strided(hidden, 0)
        for tensor in (home_rows, away_rows, weights):
            self._array(tensor)

    def fault(self, which, seed=0, kind=FAULT):
        """A kernel with one mistake (0: none), see small_kernels.cpp; the right result is 32 ones.

        kind: FAULT, FAULT_SM90 or FAULT_GRIDS.
        """
        self._call(kind, seed, 2, torch.empty(32))
        self._numbers(which)

    def fragments(self, instruction, numbers, image=None, a=None, b=None, places=(0, 0, 0, 0), seed=0):
        """float32 [128, numbers]: what each thread holds after one instruction, see small_kernels.cpp.

        image: bfloat16, shared memory. a, b: int32 [128, 4] and [128, 2], words of each thread. places: the first
        bytes of both matrices in the image, and the leading and stride bytes of their descriptors.
        """
        result = torch.full((128, numbers), float("nan"))
        self._call(FRAGMENTS, seed, 2, result)
        self._numbers(instruction, *places)
        image = torch.zeros(256, dtype=torch.bfloat16) if image is None else image
        for tensor, words in ((a, 4), (b, 2)):
            assert tensor is None or (tensor.shape, tensor.dtype) == ((128, words), torch.int32)
        self._array(image)
        self._array(torch.zeros(128, 4, dtype=torch.int32) if a is None else a)
        self._array(torch.zeros(128, 2, dtype=torch.int32) if b is None else b)
        self._array(result)

    def start(self) -> subprocess.CompletedProcess:
        self._numbers(END)
        options = {
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"} | options
        return subprocess.run([build_driver()], input=b"".join(self.parts), capture_output=True, env=environment)

    def run(self) -> list[list[torch.Tensor]]:
        said = self.start()
        assert said.returncode == 0, said.stderr.decode(errors="replace")[:6000]
        data, results = np.frombuffer(said.stdout, np.uint8), []
        for templates in self.results:
            results.append([])
            for template in templates:
                size = template.numel() * template.element_size()
                chunk, data = data[:size].copy(), data[size:]
                values = (
                    torch.from_numpy(chunk).view(template.dtype) if size > 0 else torch.empty(0, dtype=template.dtype)
                )
                results[-1].append(values.view(template.shape))
        assert len(data) == 0
        return results

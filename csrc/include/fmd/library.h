// The C functions of the op libraries, which Python calls by name.
#pragma once

namespace fmd {

// Of all ops' schemas together: one more whenever an op comes, goes, or changes its arguments, results or their
// meaning. The package refuses libraries of another version: SCHEMA_VERSION in fmd_ext/ops/library.py.
constexpr int kSchemaVersion = 3;

}  // namespace fmd

extern "C" {

// In both libraries: kSchemaVersion of its sources.
__attribute__((visibility("default"))) int fmd_ext_schema_version();

// Chooses the instruction set of the CPU kernels: "baseline", "avx2", "avx512", or "auto" for the best one that this
// CPU has, which is also what runs when nothing was chosen. Returns null, or the reason why the choice is impossible.
__attribute__((visibility("default"))) const char* fmd_ext_select_cpu_isa(const char* name);

// The instruction set in use: "baseline", "avx2" or "avx512".
__attribute__((visibility("default"))) const char* fmd_ext_cpu_isa();

// Those that this build holds and this CPU runs, best last, separated by a space.
__attribute__((visibility("default"))) const char* fmd_ext_cpu_isas();

// In the CUDA library. Chooses the kernel of an op, such as "branched_prefill", by its name in csrc/cuda/kernels.json,
// or "auto": the newest one whose present source has passed its tests on a device. Returns null, or the reason why the
// choice is impossible.
__attribute__((visibility("default"))) const char* fmd_ext_select_cuda_kernel(const char* op, const char* name);

// The name of the kernel that runs for an op on a device of a compute capability (9.0 is 90); "" for an unknown op.
__attribute__((visibility("default"))) const char* fmd_ext_cuda_kernel(const char* op, int capability);

// A line per kernel: op, name, the compute capability that it needs (0: none), the digest of its source, and the device
// on which that source has passed (none: nothing), separated by tabs; those of one op from the oldest to the newest.
__attribute__((visibility("default"))) const char* fmd_ext_cuda_kernels();
}

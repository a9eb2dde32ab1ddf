// The C functions of the op libraries, which Python calls by name.
#pragma once

namespace fmd {

// Of all ops' schemas together: one more whenever an op comes, goes, or changes its arguments, results or their
// meaning. The package refuses libraries of another version: SCHEMA_VERSION in fmd_ext/ops/library.py.
constexpr int kSchemaVersion = 2;

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

// In the CUDA library. Chooses the prefill kernel: "sm80" for every device, "sm90" for those of compute capability 9.0
// (on others a prefill then fails), or "auto". Returns null, or the reason why the choice is impossible.
__attribute__((visibility("default"))) const char* fmd_ext_select_cuda_prefill(const char* name);

// The kernel in use: "sm80" or "sm90".
__attribute__((visibility("default"))) const char* fmd_ext_cuda_prefill();
}

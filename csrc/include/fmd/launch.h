// Host entry points of the kernels. Every launcher trusts its parameters: indices in range, strides right.
#pragma once

#include "fmd/params.h"

namespace fmd {

// Results do not depend on the number of threads that parallel_for uses.
void launch_branched_prefill_cpu(const BranchedAttentionParams& params, const ParallelFor& parallel_for);

// Every group has one query: cu_seqlens_q is not read. Adjacent groups with equal prefix_start and prefix_len share
// one pass over the prefix.
void launch_branched_decode_cpu(const BranchedAttentionParams& params, const ParallelFor& parallel_for);

void launch_append_cpu(const AppendParams& params, const ParallelFor& parallel_for);

void launch_merge_cpu(const MergeParams& params, const ParallelFor& parallel_for);

}  // namespace fmd

extern "C" {

// Chooses the instruction set of the CPU kernels: "baseline", "avx2", "avx512", or "auto" for the best one that this
// CPU has, which is also what runs when nothing was chosen. Returns null, or the reason why the choice is impossible.
__attribute__((visibility("default"))) const char* fmd_ext_select_cpu_isa(const char* name);

// The instruction set in use: "baseline", "avx2" or "avx512".
__attribute__((visibility("default"))) const char* fmd_ext_cpu_isa();

// Those that this build holds and this CPU runs, best last, separated by a space.
__attribute__((visibility("default"))) const char* fmd_ext_cpu_isas();
}

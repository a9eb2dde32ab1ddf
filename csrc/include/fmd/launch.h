// Host entry points of the kernels. Every launcher trusts its parameters: indices in range, strides right.
#pragma once

#include "fmd/params.h"

namespace fmd {

// Results do not depend on the number of threads that parallel_for uses.
void launch_branched_prefill_cpu(const BranchedAttentionParams& params, ParallelFor parallel_for);

// Every group has one query: cu_seqlens_q is not read. Adjacent groups with equal prefix_start and prefix_len share
// one pass over the prefix.
void launch_branched_decode_cpu(const BranchedAttentionParams& params, ParallelFor parallel_for);

void launch_append_cpu(const AppendParams& params, ParallelFor parallel_for);

void launch_rope_append_cpu(const RopeAppendParams& params, ParallelFor parallel_for);

void launch_merge_cpu(const MergeParams& params, ParallelFor parallel_for);

// CUDA, sm_80 and up. All pointers, indices too, are device memory of the current device, and stream is a cudaStream_t
// of it. Nothing waits for the device and nothing is read back, so that a launch can be captured in a graph. A launch
// that CUDA refuses is a std::runtime_error.
//
// Attention is for bfloat16 and float16 and head_dim 64 and 128, else std::invalid_argument. K, V and out: 16-byte
// aligned, with strides to match; q: any. num_queries * group_size < 2^31. Rows of out and lse in no group are written
// too (0 and -infinity) where num_queries < num_rows.
void launch_branched_prefill_cuda(const BranchedAttentionParams& params, void* stream);

// workspace: branched_decode_workspace_cuda(params) bytes, 16-byte aligned; may be reused once the launch has run.
int64_t branched_decode_workspace_cuda(const BranchedAttentionParams& params);
void launch_branched_decode_cuda(const BranchedAttentionParams& params, void* workspace, void* stream);

void launch_append_cuda(const AppendParams& params, void* stream);

void launch_rope_append_cuda(const RopeAppendParams& params, void* stream);

void launch_merge_cuda(const MergeParams& params, void* stream);

}  // namespace fmd

extern "C" {

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

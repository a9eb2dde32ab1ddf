// The two prefill kernels, and what their launches have in common.
#pragma once

#include <algorithm>

#include "cuda/dispatch.h"
#include "fmd/branched_attention.h"

namespace fmd::cuda {

void launch_sm80_branched_prefill(const BranchedAttentionParams& params, void* stream);
// For devices of compute capability 9.0. workspace: kSm90PrefillWorkspace bytes.
void launch_sm90_branched_prefill(const BranchedAttentionParams& params, void* workspace, void* stream);
constexpr int64_t kSm90PrefillWorkspace = 16;

// Calls launch(Instance<T, head_dim>{}, blocks, row_blocks, q_is_aligned) for blocks of Shape<head_dim>::kRows rows,
// unless there are none.
template <template <int> class Shape, typename Launch>
void launch_prefill(const BranchedAttentionParams& params, const Launch& launch) {
  dispatch_attention("branched_prefill", params.dtype, params.head_dim, [&](auto instance) {
    const int64_t heads_per_kv = params.num_qo_heads / params.num_kv_heads;
    const int64_t max_rows = std::min(params.max_qo_len, params.num_queries) * heads_per_kv;
    const int64_t row_blocks = ceil_div(max_rows, Shape<decltype(instance)::kDim>::kRows);
    const int64_t blocks = row_blocks * params.num_groups * params.num_kv_heads;
    if (params.num_rows == 0 || blocks == 0) return;
    const bool q_is_aligned = is_aligned(16, params.dtype, params.q, params.q_stride_row, params.q_stride_head);
    launch(instance, blocks, static_cast<int>(row_blocks), q_is_aligned);
  });
}

}  // namespace fmd::cuda

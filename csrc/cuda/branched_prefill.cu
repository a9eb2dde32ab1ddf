#include <algorithm>

#include "cuda/branched_prefill.cuh"
#include "cuda/clear.h"
#include "cuda/dispatch.h"
#include "fmd/launch.h"

namespace fmd {

void launch_branched_prefill_cuda(const BranchedAttentionParams& params, void* stream) {
  using namespace cuda;
  const char* name = "branched_prefill";
  dispatch_attention(name, params.dtype, params.head_dim, [&](auto instance) {
    using T = typename decltype(instance)::T;
    constexpr int kDim = decltype(instance)::kDim;
    using Shape = PrefillShape<kDim>;
    if (params.num_rows == 0) return;
    clear_other_rows(params, stream);
    const int64_t group_size = params.num_qo_heads / params.num_kv_heads;
    const int64_t max_rows = std::min(params.max_qo_len, params.num_queries) * group_size;
    const int64_t row_blocks = ceil_div(max_rows, Shape::kRows);
    const int64_t blocks = row_blocks * params.num_groups * params.num_kv_heads;
    if (blocks == 0) return;
    const bool q_is_aligned = is_aligned(16, params.dtype, params.q, params.q_stride_row, params.q_stride_head);
    launch(name, branched_prefill_kernel<T, kDim>, blocks, Shape::kThreads, Shape::kSharedBytes, stream, params,
           static_cast<int>(row_blocks), q_is_aligned);
  });
}

}  // namespace fmd

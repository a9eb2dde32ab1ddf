#include <algorithm>

#include "cuda/branched_prefill.h"
#include "cuda/sm90/branched_prefill.cuh"

namespace fmd::cuda {

void launch_sm90_branched_prefill(const BranchedAttentionParams& params, void* workspace, void* stream) {
  launch_prefill<Sm90PrefillShape>(params, [&](auto instance, int64_t items, int row_blocks, bool q_is_aligned) {
    using T = typename decltype(instance)::T;
    constexpr int kDim = decltype(instance)::kDim;
    using Shape = Sm90PrefillShape<kDim>;
    // Many items have no rows where groups differ much in length. The device passes over blocks faster than a block
    // over items, which costs it an addition in global memory each.
    const int64_t row_tiles = ceil_div(params.num_queries * (params.num_qo_heads / params.num_kv_heads), Shape::kRows);
    const bool most_have_rows = 2 * row_tiles * params.num_kv_heads >= items;
    const int64_t blocks = most_have_rows ? std::min<int64_t>(items, multiprocessors()) : items;
    if (items >= int64_t{1} << 30) {
      throw std::runtime_error("branched_prefill: " + std::to_string(items) +
                               " tiles of rows, accepted are fewer than " + "2^30");
    }
    clear_memory(workspace, sizeof(int), stream);
    const PrefillQueue queue{static_cast<int*>(workspace), static_cast<int>(blocks), static_cast<int>(items),
                             row_blocks};
    launch("branched_prefill", sm90_branched_prefill_kernel<T, kDim>, blocks, Shape::kThreads, Shape::kSharedBytes,
           stream, params, queue, q_is_aligned);
  });
}

}  // namespace fmd::cuda

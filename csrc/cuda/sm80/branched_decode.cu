#include <algorithm>

#include "cuda/branched_decode.h"
#include "cuda/dispatch.h"
#include "cuda/sm80/branched_decode.cuh"

namespace fmd::cuda {
namespace {

// Blocks that a multiprocessor runs at once (shared memory allows it from sm_90 on; more only queue).
constexpr int64_t kBlocksPerMultiprocessor = 2;
// Each split costs the combine a vector per row.
constexpr int64_t kMaxSplits = 64;
// Of every group, where the split must not depend on what else is in the call.
constexpr int64_t kFixedSplits = 16;

// As few splits as fill the device: the blocks of all groups come in waves, and the last wave should be nearly full.
int64_t choose_splits(int64_t units, int64_t num_slots) {
  const int64_t slots = kBlocksPerMultiprocessor * multiprocessors();
  // A block with less than a tile for each of its four warps is not worth its launch.
  const int64_t most = std::clamp<int64_t>(ceil_div(num_slots, 64), 1, kMaxSplits);
  int64_t best = 1;
  double best_fill = 0.0;
  for (int64_t splits = 1; splits <= most; ++splits) {
    const int64_t blocks = units * splits;
    const double fill = static_cast<double>(blocks) / static_cast<double>(ceil_div(blocks, slots) * slots);
    if (fill > best_fill + 0.05) best = splits, best_fill = fill;
    if (best_fill >= 0.9) break;
  }
  return best;
}

struct Plan {
  int64_t blocks, num_splits, num_head_tiles;

  Plan(const BranchedAttentionParams& params, bool fixed_split) {
    num_head_tiles = ceil_div(params.num_qo_heads / params.num_kv_heads, kUnitRows);
    const int64_t units = params.num_groups * params.num_kv_heads * num_head_tiles;
    num_splits = fixed_split ? kFixedSplits : choose_splits(std::max<int64_t>(units, 1), params.num_slots);
    blocks = units * num_splits;
  }
};

}  // namespace

int64_t split_decode_workspace(const BranchedAttentionParams& params, bool fixed_split) {
  const int64_t row_bytes = (params.head_dim + 2) * static_cast<int64_t>(sizeof(float));
  return Plan(params, fixed_split).blocks * kUnitRows * row_bytes;
}

void launch_split_decode(const BranchedAttentionParams& params, bool fixed_split, void* workspace, void* stream) {
  const char* name = "branched_decode";
  dispatch_attention(name, params.dtype, params.head_dim, [&](auto instance) {
    using T = typename decltype(instance)::T;
    constexpr int kDim = decltype(instance)::kDim;
    using Shape = DecodeShape<kDim>;
    if (params.num_rows == 0 || params.num_groups == 0) return;
    const Plan plan(params, fixed_split);
    DecodePartials partials{};
    partials.out = static_cast<float*>(workspace);
    partials.maximum = partials.out + plan.blocks * kUnitRows * kDim;
    partials.sum = partials.maximum + plan.blocks * kUnitRows;
    partials.num_splits = static_cast<int>(plan.num_splits);
    partials.num_head_tiles = static_cast<int>(plan.num_head_tiles);
    const bool q_is_aligned = is_aligned(4, params.dtype, params.q, params.q_stride_row, params.q_stride_head);
    launch(name, branched_decode_kernel<T, kDim>, plan.blocks, Shape::kThreads, decode_shared_bytes<kDim>(), stream,
           params, partials, q_is_aligned);
    launch("branched_decode_combine", branched_decode_combine_kernel<T, kDim>,
           ceil_div(params.num_groups * params.num_qo_heads, kCombineWarps), kCombineWarps * kWarpSize,
           kCombineSharedBytes, stream, params, partials);
  });
}

}  // namespace fmd::cuda

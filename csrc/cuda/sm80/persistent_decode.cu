#include <algorithm>

#include "cuda/branched_decode.h"
#include "cuda/dispatch.h"
#include "cuda/sm80/persistent_decode.cuh"

namespace fmd::cuda {
namespace {

// More only queue: two have 128 KiB under way on a multiprocessor, several times what its share of the bandwidth needs.
constexpr int64_t kMostBlocksPerMultiprocessor = 2;

template <int kDim>
struct Plan {
  int shared_bytes;
  int64_t num_blocks, num_head_tiles, num_parts, first_bytes;

  Plan(const BranchedAttentionParams& params, bool fixed_split) {
    shared_bytes = persistent_shared_bytes<kDim>(params.num_groups);
    num_blocks = std::min(blocks_at_once(shared_bytes), kMostBlocksPerMultiprocessor * multiprocessors());
    num_head_tiles = ceil_div(params.num_qo_heads / params.num_kv_heads, kUnitRows);
    const int64_t fixed_parts = params.num_groups * params.num_kv_heads * num_head_tiles * kFixedParts;
    num_parts = fixed_split ? fixed_parts : 2 * num_blocks;
    first_bytes = ceil_div((params.num_groups + 1) * static_cast<int64_t>(sizeof(int64_t)), 16) * 16;
  }

  int64_t bytes() const {
    return first_bytes + num_parts * kUnitRows * (kDim + 2) * static_cast<int64_t>(sizeof(float));
  }
};

constexpr const char* kName = "branched_decode";

}  // namespace

bool persistent_decode_takes(const BranchedAttentionParams& params) { return params.num_groups <= kMaxScannedGroups; }

int64_t persistent_decode_workspace(const BranchedAttentionParams& params, bool fixed_split) {
  int64_t bytes = 0;
  dispatch_attention(kName, params.dtype, params.head_dim,
                     [&](auto instance) { bytes = Plan<decltype(instance)::kDim>(params, fixed_split).bytes(); });
  return bytes;
}

void launch_persistent_decode(const BranchedAttentionParams& params, bool fixed_split, void* workspace, void* stream) {
  dispatch_attention(kName, params.dtype, params.head_dim, [&](auto instance) {
    using T = typename decltype(instance)::T;
    constexpr int kDim = decltype(instance)::kDim;
    if (params.num_rows == 0 || params.num_groups == 0) return;
    const Plan<kDim> plan(params, fixed_split);
    PersistentWorkspace parts{};
    parts.first = static_cast<int64_t*>(workspace);
    parts.out = reinterpret_cast<float*>(static_cast<char*>(workspace) + plan.first_bytes);
    parts.maximum = parts.out + plan.num_parts * kUnitRows * kDim;
    parts.sum = parts.maximum + plan.num_parts * kUnitRows;
    parts.num_blocks = static_cast<int>(plan.num_blocks);
    parts.num_head_tiles = static_cast<int>(plan.num_head_tiles);
    parts.fixed_split = fixed_split;
    const bool q_is_aligned = is_aligned(4, params.dtype, params.q, params.q_stride_row, params.q_stride_head);
    launch_ahead(kName, persistent_decode_kernel<T, kDim>, plan.num_blocks, DecodeShape<kDim>::kThreads,
                 plan.shared_bytes, stream, params, parts, q_is_aligned);
    launch_behind("branched_decode_combine", persistent_combine_kernel<T, kDim>,
                  ceil_div(params.num_groups * params.num_qo_heads, kCombineWarps), kCombineWarps * kWarpSize,
                  kCombineSharedBytes, stream, params, parts);
  });
}

}  // namespace fmd::cuda

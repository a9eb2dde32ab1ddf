// Rows of K and V into their slots: bytes only, so any head_dim and dtype. A warp per row and head.
#include "cuda/append.h"

namespace fmd::cuda {

constexpr int kAppendWarps = 8;

// Unit: what one lane moves at a time; all strides and pointers are multiples of it. Params' strides are in elements.
template <typename Unit>
FMD_KERNEL(kAppendWarps* kWarpSize, 1)
append_kernel(const AppendParams params, const int element_bytes) {
  const int64_t item = block_index() * kAppendWarps + thread_index() / kWarpSize;
  const int64_t row = item / params.num_kv_heads, head = item % params.num_kv_heads;
  if (row >= params.num_rows) return;
  const int64_t slot = params.slots[row];
  const int units = static_cast<int>(params.head_dim * element_bytes / static_cast<int64_t>(sizeof(Unit)));
  const auto at = [&](auto* base, int64_t offset) { return base + offset * element_bytes; };
  const auto* k = reinterpret_cast<const Unit*>(
      at(static_cast<const char*>(params.k), row * params.k_stride_row + head * params.k_stride_head));
  const auto* v = reinterpret_cast<const Unit*>(
      at(static_cast<const char*>(params.v), row * params.v_stride_row + head * params.v_stride_head));
  auto* k_to = reinterpret_cast<Unit*>(
      at(static_cast<char*>(params.k_pool), head * params.k_pool_stride_head + slot * params.k_pool_stride_slot));
  auto* v_to = reinterpret_cast<Unit*>(
      at(static_cast<char*>(params.v_pool), head * params.v_pool_stride_head + slot * params.v_pool_stride_slot));
  for (int i = thread_index() % kWarpSize; i < 2 * units; i += kWarpSize) {
    i < units ? k_to[i] = k[i] : v_to[i - units] = v[i - units];
  }
}

void launch_narrow_append(const AppendParams& params, void* stream) {
  const bool vectors = begins_aligned(params) && params.head_dim * bytes_of(params.dtype) % 16 == 0;
  const auto run = [&](auto kernel) {
    launch("append_", kernel, ceil_div(params.num_rows * params.num_kv_heads, kAppendWarps), kAppendWarps * kWarpSize,
           0, stream, params, static_cast<int>(bytes_of(params.dtype)));
  };
  if (vectors) return run(append_kernel<Vec16>);
  params.dtype == DType::kFloat32 ? run(append_kernel<uint32_t>) : run(append_kernel<uint16_t>);
}

}  // namespace fmd::cuda

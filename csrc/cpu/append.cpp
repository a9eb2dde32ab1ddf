// Copies new keys and values into their slots.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "fmd/launch.h"

namespace fmd {

void launch_append_cpu(const AppendParams& params, const ParallelFor& parallel_for) {
  const int64_t size = params.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t row_bytes = params.head_dim * size;
  struct Context {
    const AppendParams& params;
    int64_t size;
    int64_t row_bytes;
  } context{params, size, row_bytes};
  // About 64 KiB of copying is worth a thread.
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, 2 * row_bytes * params.num_kv_heads));
  parallel_for.run(
      parallel_for, params.num_rows, grain,
      [](void* erased, int64_t begin, int64_t end) {
        const auto& [params, size, row_bytes] = *static_cast<const Context*>(erased);
        const auto copy = [&](void* pool, int64_t pool_stride_head, int64_t pool_stride_slot, const void* source,
                              int64_t stride_row, int64_t stride_head, int64_t head) {
          for (int64_t row = begin; row < end; ++row) {
            std::memcpy(
                static_cast<char*>(pool) + (head * pool_stride_head + params.slots[row] * pool_stride_slot) * size,
                static_cast<const char*>(source) + (row * stride_row + head * stride_head) * size, row_bytes);
          }
        };
        for (int64_t head = 0; head < params.num_kv_heads; ++head) {
          copy(params.k_pool, params.k_pool_stride_head, params.k_pool_stride_slot, params.k, params.k_stride_row,
               params.k_stride_head, head);
          copy(params.v_pool, params.v_pool_stride_head, params.v_pool_stride_slot, params.v, params.v_stride_row,
               params.v_stride_head, head);
        }
      },
      &context);
}

}  // namespace fmd

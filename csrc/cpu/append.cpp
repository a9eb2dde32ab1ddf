// Copies new keys and values into their slots.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "fmd/launch.h"

namespace fmd {
namespace {

int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Rows [begin, end) of K or V, head by head.
void append_rows(const AppendParams& params, void* pool, int64_t pool_stride_head, int64_t pool_stride_slot,
                 const void* source, int64_t stride_row, int64_t stride_head, int64_t begin, int64_t end) {
  const int64_t size = element_size(params.dtype);
  for (int64_t head = 0; head < params.num_kv_heads; ++head) {
    char* to = static_cast<char*>(pool) + head * pool_stride_head * size;
    const char* from = static_cast<const char*>(source) + head * stride_head * size;
    for (int64_t row = begin; row < end; ++row) {
      std::memcpy(to + params.slots[row] * pool_stride_slot * size, from + row * stride_row * size,
                  params.head_dim * size);
    }
  }
}

}  // namespace

void launch_append_cpu(const AppendParams& params, ParallelFor parallel_for) {
  // About 64 KiB of copying is worth a thread.
  const int64_t row_bytes = 2 * params.num_kv_heads * params.head_dim * element_size(params.dtype);
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, row_bytes));
  parallel_for(
      params.num_rows, grain,
      [](void* erased, int64_t begin, int64_t end) {
        const AppendParams& p = *static_cast<const AppendParams*>(erased);
        append_rows(p, p.k_pool, p.k_pool_stride_head, p.k_pool_stride_slot, p.k, p.k_stride_row, p.k_stride_head,
                    begin, end);
        append_rows(p, p.v_pool, p.v_pool_stride_head, p.v_pool_stride_slot, p.v, p.v_stride_row, p.v_stride_head,
                    begin, end);
      },
      const_cast<AppendParams*>(&params));
}

}  // namespace fmd

// Copies new keys and values into their slots.
#pragma once

#include "cpu/isa/rows.h"
#include "fmd/append.h"

namespace fmd::cpu::FMD_ISA {

// Rows [begin, end) of K or V, head by head.
inline void copy_rows(const AppendParams& params, void* pool, int64_t pool_stride_head, int64_t pool_stride_slot,
                      const void* source, int64_t stride_row, int64_t stride_head, int64_t begin, int64_t end) {
  for (int64_t head = 0; head < params.num_kv_heads; ++head) {
    for (int64_t row = begin; row < end; ++row) {
      __builtin_memcpy(element(pool, params.dtype, head * pool_stride_head + params.slots[row] * pool_stride_slot),
                       element(source, params.dtype, row * stride_row + head * stride_head),
                       params.head_dim * dtype_size(params.dtype));
    }
  }
}

inline void append_rows(const AppendParams& params, int64_t begin, int64_t end) {
  copy_rows(params, params.k_pool, params.k_pool_stride_head, params.k_pool_stride_slot, params.k, params.k_stride_row,
            params.k_stride_head, begin, end);
  copy_rows(params, params.v_pool, params.v_pool_stride_head, params.v_pool_stride_slot, params.v, params.v_stride_row,
            params.v_stride_head, begin, end);
}

inline void launch_append(const AppendParams& params, ParallelFor parallel_for) {
  const int64_t row_bytes = 2 * params.num_kv_heads * params.head_dim * dtype_size(params.dtype);
  launch_rows<AppendParams, append_rows>(params, params.num_rows, row_bytes, 65536, parallel_for);
}

}  // namespace fmd::cpu::FMD_ISA

#pragma once

#include <cstdint>

#include "fmd/types.h"

namespace fmd {

// Writes row r of k and v into slot slots[r] of the pools.
struct AppendParams {
  DType dtype;
  int64_t num_rows, num_slots, num_kv_heads, head_dim;
  void* k_pool;  // [num_kv_heads, num_slots, head_dim]
  int64_t k_pool_stride_head, k_pool_stride_slot;
  void* v_pool;
  int64_t v_pool_stride_head, v_pool_stride_slot;
  const void* k;  // [num_rows, num_kv_heads, head_dim]
  int64_t k_stride_row, k_stride_head;
  const void* v;
  int64_t v_stride_row, v_stride_head;
  const int64_t* slots;  // [num_rows]
};

void launch_append_cuda(const AppendParams& params, void* stream);

// AppendParams with rotary position embedding: of q into q_out, and of k on its way into the pool. With
// half = head_dim / 2, row r of a head x becomes, for i < half,
//   x[i] * cos[r][i] - x[i + half] * sin[r][i]  and  x[i + half] * cos[r][i + half] + x[i] * sin[r][i + half].
struct RopeAppendParams {
  AppendParams append;
  int64_t num_qo_heads;
  const void* q;  // [num_rows, num_qo_heads, head_dim]
  int64_t q_stride_row, q_stride_head;
  void* q_out;  // the same shape, no memory of q, k or v
  int64_t q_out_stride_row, q_out_stride_head;
  DType angle_dtype;  // of cos and sin: that of append, or fp32
  const void* cos;    // [num_rows, head_dim]
  int64_t cos_stride_row;
  const void* sin;
  int64_t sin_stride_row;
};

void launch_rope_append_cuda(const RopeAppendParams& params, void* stream);

}  // namespace fmd

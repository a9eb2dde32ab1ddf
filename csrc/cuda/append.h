// The kernels of append_ and rope_append_, two of each, and what their launches have in common.
#pragma once

#include "cuda/dispatch.h"
#include "fmd/append.h"

namespace fmd::cuda {

void launch_narrow_append(const AppendParams& params, void* stream);
void launch_wide_append(const AppendParams& params, void* stream);
void launch_narrow_rope_append(const RopeAppendParams& params, void* stream);
void launch_wide_rope_append(const RopeAppendParams& params, void* stream);

// Whether all rows of the pools, k and v begin at multiples of 16 bytes.
inline bool begins_aligned(const AppendParams& params) {
  return is_aligned(16, params.dtype, params.k_pool, params.k_pool_stride_head, params.k_pool_stride_slot) &&
         is_aligned(16, params.dtype, params.v_pool, params.v_pool_stride_head, params.v_pool_stride_slot) &&
         is_aligned(16, params.dtype, params.k, params.k_stride_row, params.k_stride_head) &&
         is_aligned(16, params.dtype, params.v, params.v_stride_row, params.v_stride_head);
}
// And q, q_out, cos and sin, also where half a head ends.
inline bool begins_aligned(const RopeAppendParams& params) {
  const DType dtype = params.append.dtype;
  return begins_aligned(params.append) &&
         is_aligned(16, dtype, params.q, params.q_stride_row, params.q_stride_head, params.append.head_dim / 2) &&
         is_aligned(16, dtype, params.q_out, params.q_out_stride_row, params.q_out_stride_head) &&
         is_aligned(16, params.angle_dtype, params.cos, params.cos_stride_row) &&
         is_aligned(16, params.angle_dtype, params.sin, params.sin_stride_row);
}

}  // namespace fmd::cuda

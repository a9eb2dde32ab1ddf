// Rotary position embedding of q, and of k into its slots; v is copied.
#pragma once

#include "cpu/isa/rows.h"
#include "cpu/kernels.h"
#include "fmd/append.h"

namespace fmd::cpu::FMD_ISA {

// target = source, rotated. half: half a head_dim; cos, sin: fp32 [2 * half];
// buffer: 4 * half floats.
inline void rotate_head(DType dtype, const void* source, void* target, const float* cos, const float* sin, int64_t half,
                        float* buffer) {
  float *low = buffer, *high = buffer + half, *rotated = buffer + 2 * half;
  widen(dtype, source, low, 2 * half);
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const VecF a = load<VecF>(low + i), b = load<VecF>(high + i);
    store(rotated + i, a * load<VecF>(cos + i) - b * load<VecF>(sin + i));
    store(rotated + half + i, b * load<VecF>(cos + half + i) + a * load<VecF>(sin + half + i));
  }
  for (; i < half; ++i) {
    rotated[i] = low[i] * cos[i] - high[i] * sin[i];
    rotated[half + i] = high[i] * cos[half + i] + low[i] * sin[half + i];
  }
  narrow(dtype, rotated, target, 2 * half);
}

inline void rope_append_rows(const RopeAppendParams& params, int64_t row_begin, int64_t row_end) {
  const AppendParams& append = params.append;
  const DType dtype = append.dtype;
  const int64_t dim = append.head_dim;
  float* cos = thread_scratch(ScratchUse::kWorker, 4 * dim);
  float *sin = cos + dim, *buffer = cos + 2 * dim;
  for (int64_t row = row_begin; row < row_end; ++row) {
    widen(params.angle_dtype, element(params.cos, params.angle_dtype, row * params.cos_stride_row), cos, dim);
    widen(params.angle_dtype, element(params.sin, params.angle_dtype, row * params.sin_stride_row), sin, dim);
    for (int64_t head = 0; head < params.num_qo_heads; ++head) {
      rotate_head(dtype, element(params.q, dtype, row * params.q_stride_row + head * params.q_stride_head),
                  element(params.q_out, dtype, row * params.q_out_stride_row + head * params.q_out_stride_head), cos,
                  sin, dim / 2, buffer);
    }
    const int64_t slot = append.slots[row];
    for (int64_t head = 0; head < append.num_kv_heads; ++head) {
      rotate_head(dtype, element(append.k, dtype, row * append.k_stride_row + head * append.k_stride_head),
                  element(append.k_pool, dtype, head * append.k_pool_stride_head + slot * append.k_pool_stride_slot),
                  cos, sin, dim / 2, buffer);
      __builtin_memcpy(
          element(append.v_pool, dtype, head * append.v_pool_stride_head + slot * append.v_pool_stride_slot),
          element(append.v, dtype, row * append.v_stride_row + head * append.v_stride_head), dim * dtype_size(dtype));
    }
  }
}

inline void launch_rope_append(const RopeAppendParams& params, ParallelFor parallel_for) {
  const int64_t row_elements = (params.num_qo_heads + params.append.num_kv_heads) * params.append.head_dim;
  launch_rows<RopeAppendParams, rope_append_rows>(params, params.append.num_rows, row_elements, 16384, parallel_for);
}

}  // namespace fmd::cpu::FMD_ISA

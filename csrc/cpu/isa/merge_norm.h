// In-place merge of rows, and the RMS norm of the result.
#pragma once

#include "cpu/isa/merge.h"
#include "cpu/kernels.h"

namespace fmd::cpu::FMD_ISA {

inline void merge_norm_rows(const MergeNormParams& params, int64_t row_begin, int64_t row_end) {
  const DType dtype = params.dtype;
  const int64_t size = params.hidden_size;
  const int64_t padded = (size + kLanes - 1) / kLanes * kLanes;
  float* row = thread_scratch(ScratchUse::kWorker, 2 * padded);
  float* norm_weight = row + padded;
  for (int64_t i = size; i < padded; ++i) row[i] = norm_weight[i] = 0.0f;
  widen(dtype, params.norm_weight, norm_weight, size);
  for (int64_t r = row_begin; r < row_end; ++r) {
    void* home = element(params.hidden, dtype, r * params.stride_row);
    if (params.away_rows[r] >= 0) {
      merge_rows(dtype, home, element(params.hidden, dtype, params.away_rows[r] * params.stride_row), params.weights[r],
                 size);
    }
    // The norm sees the merged row as it was rounded, as a norm of its own would.
    widen(dtype, home, row, size);
    VecF squares = {};
    for (int64_t i = 0; i < padded; i += kLanes) squares += load<VecF>(row + i) * load<VecF>(row + i);
    float total = 0.0f;
    for (int i = 0; i < kLanes; ++i) total += squares[i];
    const float factor = 1.0f / __builtin_sqrtf(total / static_cast<float>(size) + params.eps);
    for (int64_t i = 0; i < padded; i += kLanes) {
      store(row + i, load<VecF>(row + i) * factor * load<VecF>(norm_weight + i));
    }
    narrow(dtype, row, element(params.out, dtype, r * size), size);
  }
}

}  // namespace fmd::cpu::FMD_ISA

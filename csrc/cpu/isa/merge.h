// In-place merge of pairs of hidden states.
#pragma once

#include "cpu/isa/rows.h"
#include "fmd/merge.h"

namespace fmd::cpu::FMD_ISA {

template <typename T, typename Load, typename Store>
FMD_INLINE void merge_row(T* home, const T* away, float weight, int64_t size, Load load_vector, Store store_vector) {
  const float rest = 1.0f - weight;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    store_vector(home + i, weight * load_vector(home + i) + rest * load_vector(away + i));
  }
  if (i < size) {
    T home_rest[kLanes] = {}, away_rest[kLanes] = {};
    const int64_t bytes = (size - i) * sizeof(T);
    __builtin_memcpy(home_rest, home + i, bytes);
    __builtin_memcpy(away_rest, away + i, bytes);
    store_vector(home_rest, weight * load_vector(home_rest) + rest * load_vector(away_rest));
    __builtin_memcpy(home + i, home_rest, bytes);
  }
}

// home = weight * home + (1 - weight) * away, for rows of `size` elements.
FMD_INLINE void merge_rows(DType dtype, void* home, const void* away, float weight, int64_t size) {
  if (dtype == DType::kFloat32) {
    merge_row(
        static_cast<float*>(home), static_cast<const float*>(away), weight, size,
        [](const float* from) { return load<VecF>(from); }, [](float* to, VecF value) { store(to, value); });
  } else if (dtype == DType::kBFloat16) {
    merge_row(static_cast<uint16_t*>(home), static_cast<const uint16_t*>(away), weight, size, load_bfloat16,
              store_bfloat16);
  } else {
    merge_row(static_cast<uint16_t*>(home), static_cast<const uint16_t*>(away), weight, size, load_float16,
              store_float16);
  }
}

inline void merge_pairs(const MergeParams& params, int64_t pair_begin, int64_t pair_end) {
  for (int64_t j = pair_begin; j < pair_end; ++j) {
    merge_rows(params.dtype, element(params.hidden, params.dtype, params.home_rows[j] * params.stride_row),
               element(params.hidden, params.dtype, params.away_rows[j] * params.stride_row), params.weights[j],
               params.hidden_size);
  }
}

inline void launch_merge(const MergeParams& params, ParallelFor parallel_for) {
  launch_rows<MergeParams, merge_pairs>(params, params.num_pairs, params.hidden_size, 32768, parallel_for);
}

}  // namespace fmd::cpu::FMD_ISA

// In-place merge of the home rows, and the RMS norm of the result: a block per home row, which is read once from
// memory.
#pragma once

#include "cuda/merge.cuh"

namespace fmd::cuda {

constexpr int kMergeNormThreads = 256;
constexpr int kMergeNormSharedBytes = kMergeNormThreads / kWarpSize * static_cast<int>(sizeof(float));

template <typename T, int kElements>
FMD_DEVICE float sum_of_squares(const MergeVec<T, kElements>& vec) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kElements; ++j) sum += to_float(vec.element[j]) * to_float(vec.element[j]);
  return sum;
}

// kElements: of a 16-byte vector, or 1 where rows are not aligned.
template <typename T, int kElements>
FMD_KERNEL(kMergeNormThreads, 1)
merge_norm_kernel(const MergeNormParams params) {
  using Vec = MergeVec<T, kElements>;
  const int64_t row = block_index();
  T* hidden = static_cast<T*>(params.hidden);
  Vec* home = reinterpret_cast<Vec*>(hidden + row * params.stride_row);
  const int64_t away_row = params.away_rows[row];
  const int64_t num_vecs = params.hidden_size / kElements;

  float squares = 0.0f;
  if (away_row >= 0) {
    const float weight = params.weights[row];
    const Vec* away = reinterpret_cast<const Vec*>(hidden + away_row * params.stride_row);
    for (int64_t i = thread_index(); i < num_vecs; i += kMergeNormThreads) {
      const Vec merged = merged_vec(home[i], away[i], weight);
      home[i] = merged;
      squares += sum_of_squares(merged);
    }
  } else {
    for (int64_t i = thread_index(); i < num_vecs; i += kMergeNormThreads) squares += sum_of_squares(home[i]);
  }

#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) squares += shuffle_xor(squares, mask);
  float* of_warp = shared_memory<float>();
  if (thread_index() % kWarpSize == 0) of_warp[thread_index() / kWarpSize] = squares;
  block_barrier();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kMergeNormThreads / kWarpSize; ++warp) total += of_warp[warp];
  const float factor = 1.0f / sqrtf(total / static_cast<float>(params.hidden_size) + params.eps);

  // Each thread reads what it has written itself, out of the cache.
  const Vec* norm_weight = static_cast<const Vec*>(params.norm_weight);
  Vec* out = reinterpret_cast<Vec*>(static_cast<T*>(params.out) + row * params.hidden_size);
  for (int64_t i = thread_index(); i < num_vecs; i += kMergeNormThreads) {
    Vec value = home[i];
    const Vec scale = norm_weight[i];
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      value.element[j] = from_float<T>(to_float(value.element[j]) * factor * to_float(scale.element[j]));
    }
    out[i] = value;
  }
}

}  // namespace fmd::cuda

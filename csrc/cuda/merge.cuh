// In-place merge of pairs of hidden states, a block per pair.
#pragma once

#include "cuda/intrinsics/intrinsics.h"
#include "fmd/params.h"

namespace fmd::cuda {

constexpr int kMergeThreads = 128;

template <typename T, int kElements>
struct alignas(sizeof(T) * kElements) MergeVec {
  T element[kElements];
};

template <typename T, int kElements>
FMD_DEVICE MergeVec<T, kElements> merged_vec(MergeVec<T, kElements> home, MergeVec<T, kElements> away, float weight) {
  const float rest = 1.0f - weight;
#pragma unroll
  for (int j = 0; j < kElements; ++j) {
    home.element[j] = from_float<T>(weight * to_float(home.element[j]) + rest * to_float(away.element[j]));
  }
  return home;
}

// kElements: of a 16-byte vector, or 1 where rows are not aligned.
template <typename T, int kElements>
FMD_KERNEL(kMergeThreads, 1)
merge_kernel(const MergeParams params) {
  using Vec = MergeVec<T, kElements>;
  const int64_t pair = block_index();
  T* hidden = static_cast<T*>(params.hidden);
  Vec* home = reinterpret_cast<Vec*>(hidden + params.home_rows[pair] * params.stride_row);
  const Vec* away = reinterpret_cast<const Vec*>(hidden + params.away_rows[pair] * params.stride_row);
  const float weight = params.weights[pair];
  const int64_t num_vecs = params.hidden_size / kElements;
  for (int64_t i = thread_index(); i < num_vecs; i += kMergeThreads) home[i] = merged_vec(home[i], away[i], weight);
}

}  // namespace fmd::cuda

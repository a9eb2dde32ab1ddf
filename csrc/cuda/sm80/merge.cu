// In-place merge of pairs of hidden states, a block per pair.
#include "cuda/device/intrinsics.h"
#include "cuda/dispatch.h"
#include "fmd/merge.h"

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

namespace fmd {

void launch_merge_cuda(const MergeParams& params, void* stream) {
  using namespace cuda;
  if (params.num_pairs == 0 || params.hidden_size == 0) return;
  const bool vectors = is_aligned(16, params.dtype, params.hidden, params.stride_row, params.hidden_size);
  dispatch_float(params.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kElements = 16 / sizeof(T);
    const auto kernel = vectors ? merge_kernel<T, kElements> : merge_kernel<T, 1>;
    launch("merge_", kernel, params.num_pairs, kMergeThreads, 0, stream, params);
  });
}

}  // namespace fmd

#include "cuda/dispatch.h"
#include "cuda/merge.cuh"
#include "fmd/launch.h"

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

#include "cuda/dispatch.h"
#include "cuda/merge_norm.cuh"
#include "fmd/launch.h"

namespace fmd {

void launch_merge_norm_cuda(const MergeNormParams& params, void* stream) {
  using namespace cuda;
  if (params.num_home == 0 || params.hidden_size == 0) return;
  const bool vectors = is_aligned(16, params.dtype, params.hidden, params.stride_row, params.hidden_size) &&
                       is_aligned(16, params.dtype, params.norm_weight) && is_aligned(16, params.dtype, params.out);
  dispatch_float(params.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kElements = 16 / sizeof(T);
    const auto kernel = vectors ? merge_norm_kernel<T, kElements> : merge_norm_kernel<T, 1>;
    launch("merge_norm_", kernel, params.num_home, kMergeNormThreads, kMergeNormSharedBytes, stream, params);
  });
}

}  // namespace fmd

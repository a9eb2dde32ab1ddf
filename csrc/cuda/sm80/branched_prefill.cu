#include "cuda/branched_prefill.h"
#include "cuda/sm80/branched_prefill.cuh"

namespace fmd::cuda {

void launch_sm80_branched_prefill(const BranchedAttentionParams& params, void* stream) {
  launch_prefill<PrefillShape>(params, [&](auto instance, int64_t blocks, int row_blocks, bool q_is_aligned) {
    using T = typename decltype(instance)::T;
    constexpr int kDim = decltype(instance)::kDim;
    using Shape = PrefillShape<kDim>;
    launch("branched_prefill", branched_prefill_kernel<T, kDim>, blocks, Shape::kThreads, Shape::kSharedBytes, stream,
           params, row_blocks, q_is_aligned);
  });
}

}  // namespace fmd::cuda

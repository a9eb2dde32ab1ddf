#include "cuda/clear.cuh"
#include "cuda/clear.h"
#include "cuda/dispatch.h"

namespace fmd::cuda {

void clear_other_rows(const BranchedAttentionParams& params, void* stream) {
  if (params.num_queries >= params.num_rows) return;
  const int head_vecs = static_cast<int>(params.head_dim / 8);
  const int64_t items = params.num_rows * params.num_qo_heads * head_vecs;
  launch("clear", clear_kernel, ceil_div(items, kClearThreads), kClearThreads, 0, stream, params, head_vecs);
}

}  // namespace fmd::cuda

// out = 0 and lse = -infinity in all rows, for calls whose groups do not hold every row.
#include "cuda/device/intrinsics.h"
#include "cuda/dispatch.h"
#include "cuda/sm80/clear.h"
#include "fmd/branched_attention.h"

namespace fmd::cuda {

constexpr int kClearThreads = 256;

// A thread per 16 bytes of out.
FMD_KERNEL(kClearThreads, 1)
clear_kernel(const BranchedAttentionParams params, const int head_vecs) {
  const int64_t item = block_index() * kClearThreads + thread_index();
  const int64_t head_item = item / head_vecs;
  const int vec = static_cast<int>(item % head_vecs);
  const int64_t row = head_item / params.num_qo_heads, head = head_item % params.num_qo_heads;
  if (row >= params.num_rows) return;
  uint16_t* out = static_cast<uint16_t*>(params.out) + row * params.out_stride_row + head * params.out_stride_head;
  reinterpret_cast<Vec16*>(out)[vec] = Vec16{};
  if (params.lse != nullptr && vec == 0) params.lse[row * params.num_qo_heads + head] = negative_infinity();
}

void clear_other_rows(const BranchedAttentionParams& params, void* stream) {
  if (params.num_queries >= params.num_rows) return;
  const int head_vecs = static_cast<int>(params.head_dim / 8);
  const int64_t items = params.num_rows * params.num_qo_heads * head_vecs;
  launch("clear", clear_kernel, ceil_div(items, kClearThreads), kClearThreads, 0, stream, params, head_vecs);
}

}  // namespace fmd::cuda

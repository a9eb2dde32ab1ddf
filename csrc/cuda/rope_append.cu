#include "cuda/dispatch.h"
#include "cuda/rope_append.cuh"
#include "fmd/launch.h"

namespace fmd {

void launch_rope_append_cuda(const RopeAppendParams& params, void* stream) {
  using namespace cuda;
  const AppendParams& append = params.append;
  if (append.num_rows == 0) return;
  const bool vectors =
      is_aligned(16, append.dtype, append.k_pool, append.k_pool_stride_head, append.k_pool_stride_slot) &&
      is_aligned(16, append.dtype, append.v_pool, append.v_pool_stride_head, append.v_pool_stride_slot) &&
      is_aligned(16, append.dtype, append.k, append.k_stride_row, append.k_stride_head) &&
      is_aligned(16, append.dtype, append.v, append.v_stride_row, append.v_stride_head) &&
      is_aligned(16, append.dtype, params.q, params.q_stride_row, params.q_stride_head, append.head_dim / 2) &&
      is_aligned(16, append.dtype, params.q_out, params.q_out_stride_row, params.q_out_stride_head) &&
      is_aligned(16, params.angle_dtype, params.cos, params.cos_stride_row) &&
      is_aligned(16, params.angle_dtype, params.sin, params.sin_stride_row);
  dispatch_float(append.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kElements = 16 / sizeof(T);
    const auto kernel = vectors ? rope_append_kernel<T, kElements> : rope_append_kernel<T, 1>;
    const int64_t half_vecs = append.head_dim / 2 / (vectors ? kElements : 1);
    const int64_t items = append.num_rows * (params.num_qo_heads + 2 * append.num_kv_heads) * half_vecs;
    launch("rope_append_", kernel, ceil_div(items, kRopeThreads), kRopeThreads, 0, stream, params);
  });
}

}  // namespace fmd

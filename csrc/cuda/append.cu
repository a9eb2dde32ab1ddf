#include "cuda/append.cuh"
#include "cuda/dispatch.h"
#include "fmd/launch.h"

namespace fmd {

void launch_append_cuda(const AppendParams& params, void* stream) {
  using namespace cuda;
  if (params.num_rows == 0) return;
  const bool vectors =
      is_aligned(16, params.dtype, params.k_pool, params.k_pool_stride_head, params.k_pool_stride_slot) &&
      is_aligned(16, params.dtype, params.v_pool, params.v_pool_stride_head, params.v_pool_stride_slot) &&
      is_aligned(16, params.dtype, params.k, params.k_stride_row, params.k_stride_head) &&
      is_aligned(16, params.dtype, params.v, params.v_stride_row, params.v_stride_head, params.head_dim);
  const auto run = [&](auto kernel) {
    launch("append_", kernel, ceil_div(params.num_rows * params.num_kv_heads, kAppendWarps), kAppendWarps * kWarpSize,
           0, stream, params, static_cast<int>(bytes_of(params.dtype)));
  };
  if (vectors) return run(append_kernel<Vec16>);
  params.dtype == DType::kFloat32 ? run(append_kernel<uint32_t>) : run(append_kernel<uint16_t>);
}

}  // namespace fmd

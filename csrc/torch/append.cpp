#include "append.h"

namespace fmd {

AppendParams append_params(const char* op, const Tensor& k_pool, const Tensor& v_pool, const Tensor& k, const Tensor& v,
                           const Tensor& slots) {
  const Argument k_pool_arg{op, "k_pool", k_pool}, v_pool_arg{op, "v_pool", v_pool}, k_arg{op, "k", k},
      v_arg{op, "v", v}, slots_arg{op, "slots", slots};
  k_pool_arg.has_shape(kPoolLayout, {-1, -1, -1});
  v_pool_arg.has_shape(kPoolLayout, {k_pool.size(0), k_pool.size(1), k_pool.size(2)});
  k_arg.has_shape("[num_rows, num_kv_heads, head_dim]", {-1, k_pool.size(0), k_pool.size(2)});
  v_arg.has_shape("[num_rows, num_kv_heads, head_dim]", {k.size(0), k_pool.size(0), k_pool.size(2)});
  slots_arg.is_index_vector("[num_rows]", k.size(0));

  AppendParams params{};
  params.dtype = k_pool_arg.float_dtype();
  params.num_rows = k.size(0);
  params.num_slots = k_pool.size(1);
  params.num_kv_heads = k_pool.size(0);
  params.head_dim = k_pool.size(2);
  k_pool_arg.has_supported_head_dim(params.head_dim);
  for (const Argument& arg : {v_pool_arg, k_arg, v_arg}) arg.has_dtype(k_pool.scalar_type());
  for (const Argument& arg : {k_pool_arg, v_pool_arg, k_arg, v_arg}) arg.has_contiguous_rows();
  for (const Argument& arg : {k_pool_arg, v_pool_arg}) arg.has_no_repeated_memory();
  for (const Argument& arg : {v_pool_arg, k_arg, v_arg, slots_arg}) arg.is_on_device_of(k_pool_arg);

  params.k_pool = k_pool.mutable_data_ptr();
  params.k_pool_stride_head = k_pool.stride(0);
  params.k_pool_stride_slot = k_pool.stride(1);
  params.v_pool = v_pool.mutable_data_ptr();
  params.v_pool_stride_head = v_pool.stride(0);
  params.v_pool_stride_slot = v_pool.stride(1);
  params.k = k.const_data_ptr();
  params.k_stride_row = k.stride(0);
  params.k_stride_head = k.stride(1);
  params.v = v.const_data_ptr();
  params.v_stride_row = v.stride(0);
  params.v_stride_head = v.stride(1);
  params.slots = static_cast<const int64_t*>(slots.const_data_ptr());
  return params;
}

namespace {

void append_(Tensor k_pool, Tensor v_pool, const Tensor& k, const Tensor& v, const Tensor& slots) {
  const AppendParams params = append_params("append_", k_pool, v_pool, k, v, slots);
#ifdef FMD_FOR_CUDA
  const OnDeviceOf device(k_pool);
  launch_append_cuda(params, device.stream());
#else
  check_slots("append_", params);
  cpu::kernels().append(params, torch_parallel_for);
#endif
}

}  // namespace

FMD_OP(append_, "(Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor k, Tensor v, Tensor slots) -> ()")

}  // namespace fmd

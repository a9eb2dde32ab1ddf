#include "append.h"

namespace fmd {
namespace {

RopeAppendParams rope_append_params(const Tensor& k_pool, const Tensor& v_pool, const Tensor& q_out, const Tensor& q,
                                    const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                                    const Tensor& slots) {
  const char* op = "rope_append_";
  const Argument k_pool_arg{op, "k_pool", k_pool}, out_arg{op, "q_out", q_out}, q_arg{op, "q", q},
      cos_arg{op, "cos", cos}, sin_arg{op, "sin", sin};
  RopeAppendParams params{};
  params.append = append_params(op, k_pool, v_pool, k, v, slots);
  q_arg.has_shape("[num_rows, num_qo_heads, head_dim]", {k.size(0), -1, params.append.head_dim});
  out_arg.has_shape("[num_rows, num_qo_heads, head_dim]", {k.size(0), q.size(1), params.append.head_dim});
  for (const Argument& arg : {q_arg, out_arg}) {
    arg.has_dtype(k_pool.scalar_type());
    arg.has_contiguous_rows();
  }
  out_arg.has_no_repeated_memory();
  const ScalarType angle_dtype = cos.scalar_type();
  if (angle_dtype != ScalarType::Float) cos_arg.has_dtype(k_pool.scalar_type());
  sin_arg.has_dtype(angle_dtype);
  for (const Argument& arg : {cos_arg, sin_arg}) {
    arg.has_shape("[num_rows, head_dim]", {k.size(0), params.append.head_dim});
    arg.has_contiguous_rows();
  }
  for (const Argument& arg : {out_arg, q_arg, cos_arg, sin_arg}) arg.is_on_device_of(k_pool_arg);

  params.num_qo_heads = q.size(1);
  params.q = q.const_data_ptr();
  params.q_stride_row = q.stride(0);
  params.q_stride_head = q.stride(1);
  params.q_out = q_out.mutable_data_ptr();
  params.q_out_stride_row = q_out.stride(0);
  params.q_out_stride_head = q_out.stride(1);
  params.angle_dtype = cos_arg.float_dtype();
  params.cos = cos.const_data_ptr();
  params.cos_stride_row = cos.stride(0);
  params.sin = sin.const_data_ptr();
  params.sin_stride_row = sin.stride(0);
  return params;
}

void rope_append_(Tensor k_pool, Tensor v_pool, Tensor q_out, const Tensor& q, const Tensor& k, const Tensor& v,
                  const Tensor& cos, const Tensor& sin, const Tensor& slots) {
  const RopeAppendParams params = rope_append_params(k_pool, v_pool, q_out, q, k, v, cos, sin, slots);
#ifdef FMD_FOR_CUDA
  const OnDeviceOf device(k_pool);
  launch_rope_append_cuda(params, device.stream());
#else
  check_slots("rope_append_", params.append);
  cpu::kernels().rope_append(params, torch_parallel_for);
#endif
}

}  // namespace

FMD_OP(rope_append_,
       "(Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor(c!) q_out, Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, "
       "Tensor slots) -> ()")

}  // namespace fmd

#include "checks.h"

#include <cmath>

namespace fmd {
namespace {

const char* kPoolLayout = "[num_kv_heads, num_slots, head_dim]";

void check_head_dim(const Argument& of, int64_t head_dim) {
  if (head_dim > 0 && head_dim % 8 == 0) return;
  of.fail("has head_dim ", head_dim, ", accepted are the positive multiples of 8");
}

}  // namespace

BranchedAttentionParams attention_params(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                         const Tensor& qo_rows, const Tensor* cu_seqlens_q, const Tensor& segments,
                                         double softmax_scale) {
  const Argument q_arg{op, "q", q}, k_arg{op, "k", k}, v_arg{op, "v", v};
  const Argument rows_arg{op, "qo_rows", qo_rows}, segments_arg{op, "segments", segments};
  q_arg.has_shape("[num_rows, num_qo_heads, head_dim]", {-1, -1, -1});
  k_arg.has_shape(kPoolLayout, {-1, -1, q.size(2)});
  v_arg.has_shape(kPoolLayout, {k.size(0), k.size(1), k.size(2)});
  segments_arg.has_shape("[num_groups, 4]", {-1, 4});

  BranchedAttentionParams params{};
  params.dtype = q_arg.float_dtype();
  params.num_rows = q.size(0);
  params.num_slots = k.size(1);
  params.num_qo_heads = q.size(1);
  params.num_kv_heads = k.size(0);
  params.head_dim = q.size(2);
  params.num_groups = segments.size(0);
  params.num_queries = qo_rows.numel();
  params.softmax_scale = static_cast<float>(softmax_scale);

  check_head_dim(q_arg, params.head_dim);
  if (params.num_kv_heads < 1 || params.num_qo_heads < 1 || params.num_qo_heads % params.num_kv_heads != 0) {
    q_arg.fail("has ", params.num_qo_heads, " heads, accepted are the positive multiples of the ", params.num_kv_heads,
               " heads of k");
  }
  if (!std::isfinite(softmax_scale)) {
    fail("fmd_ext::", op, ": softmax_scale is ", softmax_scale, ", accepted are finite numbers");
  }
  for (const Argument& arg : {k_arg, v_arg}) arg.has_dtype(q.scalar_type());
  for (const Argument& arg : {q_arg, k_arg, v_arg}) arg.has_contiguous_rows();
  if (cu_seqlens_q != nullptr) {
    const Argument arg{op, "cu_seqlens_q", *cu_seqlens_q};
    arg.is_index_vector("[num_groups + 1]", params.num_groups + 1);
    arg.is_on_device_of(q_arg);
    rows_arg.is_index_vector("[queries of all groups]", -1);
  } else {
    rows_arg.is_index_vector("[num_groups]", params.num_groups);
  }
  segments_arg.has_dtype(ScalarType::Long);
  segments_arg.is_contiguous();
  for (const Argument& arg : {k_arg, v_arg, rows_arg, segments_arg}) arg.is_on_device_of(q_arg);

  params.q = q.const_data_ptr();
  params.q_stride_row = q.stride(0);
  params.q_stride_head = q.stride(1);
  params.k = k.const_data_ptr();
  params.k_stride_head = k.stride(0);
  params.k_stride_slot = k.stride(1);
  params.v = v.const_data_ptr();
  params.v_stride_head = v.stride(0);
  params.v_stride_slot = v.stride(1);
  params.qo_rows = static_cast<const int64_t*>(qo_rows.const_data_ptr());
  if (cu_seqlens_q != nullptr) params.cu_seqlens_q = static_cast<const int64_t*>(cu_seqlens_q->const_data_ptr());
  static_assert(sizeof(Segment) == 4 * sizeof(int64_t), "a row of the segments tensor is a Segment");
  params.segments = static_cast<const Segment*>(segments.const_data_ptr());
  return params;
}

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
  check_head_dim(k_pool_arg, params.head_dim);
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

MergeParams merge_params(const Tensor& hidden, const Tensor& home_rows, const Tensor& away_rows,
                         const Tensor& weights) {
  const char* op = "merge_";
  const Argument hidden_arg{op, "hidden", hidden}, home_arg{op, "home_rows", home_rows},
      away_arg{op, "away_rows", away_rows}, weights_arg{op, "weights", weights};
  hidden_arg.has_shape("[num_rows, hidden_size]", {-1, -1});
  home_arg.is_index_vector("[num_pairs]", -1);
  away_arg.is_index_vector("[num_pairs]", home_rows.size(0));
  weights_arg.has_dtype(ScalarType::Float);
  weights_arg.has_shape("[num_pairs]", {home_rows.size(0)});
  weights_arg.is_contiguous();

  MergeParams params{};
  params.dtype = hidden_arg.float_dtype();
  params.num_rows = hidden.size(0);
  params.hidden_size = hidden.size(1);
  params.num_pairs = home_rows.size(0);
  hidden_arg.has_contiguous_rows();
  hidden_arg.has_no_repeated_memory();
  for (const Argument& arg : {home_arg, away_arg, weights_arg}) arg.is_on_device_of(hidden_arg);

  params.hidden = hidden.mutable_data_ptr();
  params.stride_row = hidden.stride(0);
  params.home_rows = static_cast<const int64_t*>(home_rows.const_data_ptr());
  params.away_rows = static_cast<const int64_t*>(away_rows.const_data_ptr());
  params.weights = static_cast<const float*>(weights.const_data_ptr());
  return params;
}

}  // namespace fmd

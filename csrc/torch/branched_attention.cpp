#include "branched_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace fmd {

#ifdef FMD_FOR_CUDA
namespace {

// What the CUDA kernels ask for beyond what every device accepts.
void check_for_cuda(const char* op, const BranchedAttentionParams& params, const Tensor& q, const Tensor& k,
                    const Tensor& v) {
  const Argument q_arg{op, "q", q};
  if (params.dtype == DType::kFloat32) {
    q_arg.fail("has dtype Float, accepted on CUDA are BFloat16 and Half");
  }
  if (params.head_dim != 64 && params.head_dim != 128) {
    q_arg.fail("has head_dim ", params.head_dim, ", accepted on CUDA are 64 and 128");
  }
  constexpr int64_t kVecElements = 8;  // of 16 bytes
  for (const Argument& arg : {Argument{op, "k", k}, Argument{op, "v", v}}) {
    const bool aligned = reinterpret_cast<uintptr_t>(arg.tensor.const_data_ptr()) % 16 == 0;
    if (aligned && arg.tensor.stride(0) % kVecElements == 0 && arg.tensor.stride(1) % kVecElements == 0) continue;
    arg.fail("has strides [", arg.tensor.stride(0), ", ", arg.tensor.stride(1), ", 1] and ",
             aligned ? "an aligned" : "a misaligned", " address, accepted on CUDA are multiples of ", kVecElements,
             " and 16-byte aligned memory");
  }
  constexpr int64_t kMaxSlots = int64_t{1} << 30;
  if (params.num_slots > kMaxSlots) {
    Argument{op, "k", k}.fail("has ", params.num_slots, " slots, accepted on CUDA are at most 2^30");
  }
  const int64_t heads_per_kv = params.num_qo_heads / params.num_kv_heads;
  if (params.num_queries * heads_per_kv > INT32_MAX) {
    q_arg.fail("has ", params.num_queries, " queries with ", heads_per_kv,
               " heads per kv head, accepted on CUDA are fewer than 2^31 in all");
  }
}

}  // namespace
#endif

BranchedAttentionParams attention_params(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                         const Tensor& qo_rows, const Tensor* cu_seqlens_q, const Tensor& key_ranges,
                                         double softmax_scale) {
  const Argument q_arg{op, "q", q}, k_arg{op, "k", k}, v_arg{op, "v", v};
  const Argument rows_arg{op, "qo_rows", qo_rows}, key_ranges_arg{op, "key_ranges", key_ranges};
  q_arg.has_shape("[num_rows, num_qo_heads, head_dim]", {-1, -1, -1});
  k_arg.has_shape(kPoolLayout, {-1, -1, q.size(2)});
  v_arg.has_shape(kPoolLayout, {k.size(0), k.size(1), k.size(2)});
  key_ranges_arg.has_shape("[num_groups, 4]", {-1, 4});

  BranchedAttentionParams params{};
  params.dtype = q_arg.float_dtype();
  params.num_rows = q.size(0);
  params.num_slots = k.size(1);
  params.num_qo_heads = q.size(1);
  params.num_kv_heads = k.size(0);
  params.head_dim = q.size(2);
  params.num_groups = key_ranges.size(0);
  params.num_queries = qo_rows.numel();
  params.softmax_scale = static_cast<float>(softmax_scale);

  q_arg.has_supported_head_dim(params.head_dim);
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
  key_ranges_arg.has_dtype(ScalarType::Long);
  key_ranges_arg.is_contiguous();
  for (const Argument& arg : {k_arg, v_arg, rows_arg, key_ranges_arg}) arg.is_on_device_of(q_arg);

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
  static_assert(sizeof(KeyRanges) == 4 * sizeof(int64_t), "a row of the key_ranges tensor is a KeyRanges");
  params.key_ranges = static_cast<const KeyRanges*>(key_ranges.const_data_ptr());
#ifdef FMD_FOR_CUDA
  check_for_cuda(op, params, q, k, v);
#endif
  return params;
}

std::tuple<Tensor, Tensor> allocate_outputs(BranchedAttentionParams& params, const Tensor& q, bool return_lse) {
  const std::vector<int64_t> out_shape = {params.num_rows, params.num_qo_heads, params.head_dim};
  const std::vector<int64_t> lse_shape =
      return_lse ? std::vector<int64_t>{params.num_rows, params.num_qo_heads} : std::vector<int64_t>{0};
  Tensor out = torch::stable::new_empty(q, out_shape);
  Tensor lse = torch::stable::new_empty(q, lse_shape, ScalarType::Float);
  params.out = out.mutable_data_ptr();
  params.out_stride_row = params.num_qo_heads * params.head_dim;
  params.out_stride_head = params.head_dim;
  params.lse = return_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;
  return {out, lse};
}

#ifndef FMD_FOR_CUDA

namespace {

void check_key_ranges(const char* op, const BranchedAttentionParams& params) {
  const auto check = [&](int64_t group, const char* what, int64_t start, int64_t length) {
    if (length >= 0 && (length == 0 || (start >= 0 && start <= params.num_slots - length))) return;
    fail("fmd_ext::", op, ": key_ranges[", group, "] has ", what, "_start ", start, " and ", what, "_len ", length,
         ", accepted are ranges of slots 0 to ", params.num_slots - 1);
  };
  for (int64_t group = 0; group < params.num_groups; ++group) {
    const KeyRanges& ranges = params.key_ranges[group];
    check(group, "kv", ranges.kv_start, ranges.kv_len);
    check(group, "prefix", ranges.prefix_start, ranges.prefix_len);
  }
}

}  // namespace

std::vector<char> check_groups(const char* op, const BranchedAttentionParams& params) {
  check_key_ranges(op, params);
  check_range(op, "qo_rows", params.qo_rows, params.num_queries, params.num_rows, "rows of q");
  std::vector<char> in_group(params.num_rows, 0);
  mark_rows(op, "qo_rows", params.qo_rows, params.num_queries, in_group);
  return in_group;
}

void fill_other_rows(const BranchedAttentionParams& params, const std::vector<char>& in_group) {
  const int64_t row_bytes = params.num_qo_heads * params.head_dim * bytes_of(params.dtype);
  for (int64_t row = 0; row < params.num_rows; ++row) {
    if (in_group[row]) continue;
    std::memset(static_cast<char*>(params.out) + row * row_bytes, 0, row_bytes);
    if (params.lse == nullptr) continue;
    std::fill_n(params.lse + row * params.num_qo_heads, params.num_qo_heads, -std::numeric_limits<float>::infinity());
  }
}

#endif

}  // namespace fmd

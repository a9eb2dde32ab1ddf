// The ops on CUDA tensors. Index values stay on the device: what the CPU checks of them is the caller's word here, so
// that no op waits for the device.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <tuple>
#include <vector>

#include "checks.h"
#include "fmd/launch.h"

namespace fmd {
namespace {

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

// What the attention kernels ask for beyond what every device accepts.
void check_cuda_attention(const char* op, const BranchedAttentionParams& params, const Tensor& q, const Tensor& k,
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
  const int64_t group_size = params.num_qo_heads / params.num_kv_heads;
  if (params.num_queries * group_size > INT32_MAX) {
    q_arg.fail("has ", params.num_queries, " queries with ", group_size,
               " heads per kv head, accepted on CUDA are fewer than 2^31 in all");
  }
}

// Allocates (out, lse) and calls launch(params, stream) with the device of q current.
template <typename Launch>
std::tuple<Tensor, Tensor> attend(BranchedAttentionParams params, const Tensor& q, bool return_lse, Launch launch) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const std::vector<int64_t> out_shape = {params.num_rows, params.num_qo_heads, params.head_dim};
  const std::vector<int64_t> lse_shape =
      return_lse ? std::vector<int64_t>{params.num_rows, params.num_qo_heads} : std::vector<int64_t>{0};
  Tensor out = torch::stable::new_empty(q, out_shape);
  Tensor lse = torch::stable::new_empty(q, lse_shape, ScalarType::Float);
  params.out = out.mutable_data_ptr();
  params.out_stride_row = params.num_qo_heads * params.head_dim;
  params.out_stride_head = params.head_dim;
  params.lse = return_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;
  launch(params, current_stream(q));
  return {out, lse};
}

std::tuple<Tensor, Tensor> branched_prefill(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& qo_rows,
                                            const Tensor& cu_seqlens_q, const Tensor& segments, int64_t max_qo_len,
                                            double softmax_scale, bool return_lse) {
  const char* op = "branched_prefill";
  BranchedAttentionParams params = attention_params(op, q, k, v, qo_rows, &cu_seqlens_q, segments, softmax_scale);
  params.max_qo_len = max_qo_len;
  if (max_qo_len < 0) fail("fmd_ext::", op, ": max_qo_len is ", max_qo_len, ", accepted are values from 0 on");
  check_cuda_attention(op, params, q, k, v);
  return attend(params, q, return_lse, launch_branched_prefill_cuda);
}

std::tuple<Tensor, Tensor> branched_decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& qo_rows,
                                           const Tensor& segments, double softmax_scale, bool return_lse) {
  const char* op = "branched_decode";
  BranchedAttentionParams params = attention_params(op, q, k, v, qo_rows, nullptr, segments, softmax_scale);
  params.max_qo_len = 1;
  check_cuda_attention(op, params, q, k, v);
  return attend(params, q, return_lse, [&](const BranchedAttentionParams& complete, void* stream) {
    const std::vector<int64_t> floats = {branched_decode_workspace_cuda(complete) / 4};
    Tensor workspace = torch::stable::new_empty(q, floats, ScalarType::Float);
    launch_branched_decode_cuda(complete, workspace.mutable_data_ptr(), stream);
  });
}

void append_(Tensor k_pool, Tensor v_pool, const Tensor& k, const Tensor& v, const Tensor& slots) {
  const AppendParams params = append_params("append_", k_pool, v_pool, k, v, slots);
  const torch::stable::accelerator::DeviceGuard guard(k_pool.get_device_index());
  launch_append_cuda(params, current_stream(k_pool));
}

void rope_append_(Tensor k_pool, Tensor v_pool, Tensor q_out, const Tensor& q, const Tensor& k, const Tensor& v,
                  const Tensor& cos, const Tensor& sin, const Tensor& slots) {
  const RopeAppendParams params = rope_append_params(k_pool, v_pool, q_out, q, k, v, cos, sin, slots);
  const torch::stable::accelerator::DeviceGuard guard(k_pool.get_device_index());
  launch_rope_append_cuda(params, current_stream(k_pool));
}

void merge_(Tensor hidden, const Tensor& home_rows, const Tensor& away_rows, const Tensor& weights) {
  const MergeParams params = merge_params(hidden, home_rows, away_rows, weights);
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  launch_merge_cuda(params, current_stream(hidden));
}

Tensor merge_norm_(Tensor hidden, const Tensor& away_rows, const Tensor& weights, const Tensor& norm_weight,
                   double eps) {
  MergeNormParams params = merge_norm_params(hidden, away_rows, weights, norm_weight, eps);
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device_index());
  const std::vector<int64_t> shape = {params.num_home, params.hidden_size};
  Tensor out = torch::stable::new_empty(hidden, shape);
  params.out = out.mutable_data_ptr();
  launch_merge_norm_cuda(params, current_stream(hidden));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmd_ext, CUDA, m) {
  m.impl("append_", TORCH_BOX(&append_));
  m.impl("rope_append_", TORCH_BOX(&rope_append_));
  m.impl("branched_prefill", TORCH_BOX(&branched_prefill));
  m.impl("branched_decode", TORCH_BOX(&branched_decode));
  m.impl("merge_", TORCH_BOX(&merge_));
  m.impl("merge_norm_", TORCH_BOX(&merge_norm_));
}

}  // namespace fmd

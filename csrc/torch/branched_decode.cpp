#include "branched_attention.h"

namespace fmd {
namespace {

std::tuple<Tensor, Tensor> branched_decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& qo_rows,
                                           const Tensor& key_ranges, double softmax_scale, bool return_lse,
                                           [[maybe_unused]] bool fixed_split) {
  const char* op = "branched_decode";
  const BranchedAttentionParams params = attention_params(op, q, k, v, qo_rows, nullptr, key_ranges, softmax_scale);
#ifdef FMD_FOR_CUDA
  return attend(op, params, q, return_lse, [&](const BranchedAttentionParams& complete, void* stream) {
    const std::vector<int64_t> floats = {branched_decode_workspace_cuda(complete, fixed_split) / 4};
    Tensor workspace = torch::stable::new_empty(q, floats, ScalarType::Float);
    launch_branched_decode_cuda(complete, fixed_split, workspace.mutable_data_ptr(), stream);
  });
#else
  // Its split depends on lengths only.
  return attend(op, params, q, return_lse, [](const BranchedAttentionParams& complete) {
    launch_branched_decode_cpu(complete, torch_parallel_for);
  });
#endif
}

}  // namespace

FMD_OP(branched_decode,
       "(Tensor q, Tensor k, Tensor v, Tensor qo_rows, Tensor key_ranges, float softmax_scale, bool return_lse, "
       "bool fixed_split) -> (Tensor, Tensor)")

}  // namespace fmd

#include "branched_attention.h"

namespace fmd {
namespace {

#ifndef FMD_FOR_CUDA
void check_cu_seqlens(const char* op, const BranchedAttentionParams& params, int64_t max_qo_len) {
  const int64_t* cu = params.cu_seqlens_q;
  if (cu[0] != 0) fail("fmd_ext::", op, ": cu_seqlens_q[0] is ", cu[0], ", accepted is 0");
  for (int64_t group = 0; group < params.num_groups; ++group) {
    const int64_t qo_len = cu[group + 1] - cu[group];
    if (qo_len < 0) {
      fail("fmd_ext::", op, ": cu_seqlens_q[", group + 1, "] is ", cu[group + 1],
           ", accepted are values not below the one before it, ", cu[group]);
    }
    if (qo_len > max_qo_len) {
      fail("fmd_ext::", op, ": max_qo_len is ", max_qo_len, ", accepted are values from ", qo_len,
           " on, the length of group ", group);
    }
  }
  if (cu[params.num_groups] != params.num_queries) {
    fail("fmd_ext::", op, ": cu_seqlens_q ends with ", cu[params.num_groups], ", accepted is ", params.num_queries,
         ", the length of qo_rows");
  }
}
#endif

std::tuple<Tensor, Tensor> branched_prefill(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& qo_rows,
                                            const Tensor& cu_seqlens_q, const Tensor& key_ranges, int64_t max_qo_len,
                                            double softmax_scale, bool return_lse) {
  const char* op = "branched_prefill";
  BranchedAttentionParams params = attention_params(op, q, k, v, qo_rows, &cu_seqlens_q, key_ranges, softmax_scale);
  params.max_qo_len = max_qo_len;
#ifdef FMD_FOR_CUDA
  if (max_qo_len < 0) fail("fmd_ext::", op, ": max_qo_len is ", max_qo_len, ", accepted are values from 0 on");
  return attend(op, params, q, return_lse, [&](const BranchedAttentionParams& complete, void* stream) {
    const std::vector<int64_t> floats = {branched_prefill_workspace_cuda(complete) / 4};
    Tensor workspace = torch::stable::new_empty(q, floats, ScalarType::Float);
    launch_branched_prefill_cuda(complete, workspace.mutable_data_ptr(), stream);
  });
#else
  check_cu_seqlens(op, params, max_qo_len);
  return attend(op, params, q, return_lse, [](const BranchedAttentionParams& complete) {
    launch_branched_prefill_cpu(complete, torch_parallel_for);
  });
#endif
}

}  // namespace

FMD_OP(branched_prefill,
       "(Tensor q, Tensor k, Tensor v, Tensor qo_rows, Tensor cu_seqlens_q, Tensor key_ranges, int max_qo_len, "
       "float softmax_scale, bool return_lse) -> (Tensor, Tensor)")

}  // namespace fmd

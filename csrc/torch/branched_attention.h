// What branched_prefill and branched_decode share: checks, outputs, and the order of a call.
#pragma once

#include <tuple>
#include <vector>

#include "fmd/branched_attention.h"
#include "op.h"

namespace fmd {

// Sizes, strides and dtypes of the tensors of both ops. cu_seqlens_q: null for decode.
// Leaves out, lse and the values of index tensors to attend().
BranchedAttentionParams attention_params(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                         const Tensor& qo_rows, const Tensor* cu_seqlens_q, const Tensor& key_ranges,
                                         double softmax_scale);

// (out, lse), which params point to from then on.
std::tuple<Tensor, Tensor> allocate_outputs(BranchedAttentionParams& params, const Tensor& q, bool return_lse);

#ifndef FMD_FOR_CUDA

// Checks the values of key_ranges and qo_rows. Returns which rows of q are in a group.
std::vector<char> check_groups(const char* op, const BranchedAttentionParams& params);

// out = 0 and lse = -infinity in the rows of no group.
void fill_other_rows(const BranchedAttentionParams& params, const std::vector<char>& in_group);

#endif

// Calls launch(params, stream) on CUDA, launch(params) on the CPU.
template <typename Launch>
std::tuple<Tensor, Tensor> attend(const char* op, BranchedAttentionParams params, const Tensor& q, bool return_lse,
                                  Launch launch) {
#ifdef FMD_FOR_CUDA
  static_cast<void>(op);
  const OnDeviceOf device(q);
  const auto outputs = allocate_outputs(params, q, return_lse);
  launch(params, device.stream());
#else
  const std::vector<char> in_group = check_groups(op, params);
  const auto outputs = allocate_outputs(params, q, return_lse);
  if (params.num_queries < params.num_rows) fill_other_rows(params, in_group);
  if (params.num_queries > 0) launch(params);
#endif
  return outputs;
}

}  // namespace fmd

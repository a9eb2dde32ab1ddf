#include "fmd/merge.h"

#include <vector>

#include "op.h"

namespace fmd {
namespace {

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

#ifndef FMD_FOR_CUDA
void check_rows(const char* op, const MergeParams& params) {
  check_range(op, "home_rows", params.home_rows, params.num_pairs, params.num_rows, "rows of hidden");
  check_range(op, "away_rows", params.away_rows, params.num_pairs, params.num_rows, "rows of hidden");
  std::vector<char> is_home(params.num_rows, 0);
  mark_rows(op, "home_rows", params.home_rows, params.num_pairs, is_home);
  for (int64_t j = 0; j < params.num_pairs; ++j) {
    if (!is_home[params.away_rows[j]]) continue;
    fail("fmd_ext::", op, ": away_rows[", j, "] is ", params.away_rows[j],
         ", which is also a home row; accepted are rows that are not written");
  }
}
#endif

void merge_(Tensor hidden, const Tensor& home_rows, const Tensor& away_rows, const Tensor& weights) {
  const MergeParams params = merge_params(hidden, home_rows, away_rows, weights);
#ifdef FMD_FOR_CUDA
  const OnDeviceOf device(hidden);
  launch_merge_cuda(params, device.stream());
#else
  check_rows("merge_", params);
  cpu::kernels().merge(params, torch_parallel_for);
#endif
}

}  // namespace

FMD_OP(merge_, "(Tensor(a!) hidden, Tensor home_rows, Tensor away_rows, Tensor weights) -> ()")

}  // namespace fmd

// The ops on CPU tensors: checks of index values (on the host they can be read), outputs, launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "checks.h"
#include "fmd/launch.h"

namespace fmd {
namespace {

// torch's own thread pool, so that torch.set_num_threads() holds.
void torch_parallel_for(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* ctx) {
  if (count <= 0) return;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(ctx, begin, end); });
}

void check_range(const char* op, const char* name, const int64_t* values, int64_t count, int64_t end,
                 const char* what) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] >= 0 && values[i] < end) continue;
    fail("fmd_ext::", op, ": ", name, "[", i, "] is ", values[i], ", accepted are 0 to ", end - 1, " (", what, ")");
  }
}

// Marks rows[i], and refuses a row that was marked before.
void mark_rows(const char* op, const char* name, const int64_t* rows, int64_t count, std::vector<char>& marked) {
  for (int64_t i = 0; i < count; ++i) {
    if (marked[rows[i]]) fail("fmd_ext::", op, ": ", name, "[", i, "] is ", rows[i], ", which occurs twice");
    marked[rows[i]] = 1;
  }
}

void check_segments(const char* op, const BranchedAttentionParams& params) {
  const auto check = [&](int64_t group, const char* what, int64_t start, int64_t length) {
    if (length >= 0 && (length == 0 || (start >= 0 && start <= params.num_slots - length))) return;
    fail("fmd_ext::", op, ": segments[", group, "] has ", what, "_start ", start, " and ", what, "_len ", length,
         ", accepted are ranges of slots 0 to ", params.num_slots - 1);
  };
  for (int64_t group = 0; group < params.num_groups; ++group) {
    const Segment& segment = params.segments[group];
    check(group, "kv", segment.kv_start, segment.kv_len);
    check(group, "prefix", segment.prefix_start, segment.prefix_len);
  }
}

void check_cu_seqlens(const char* op, const BranchedAttentionParams& params, int64_t num_queries, int64_t max_qo_len) {
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
  if (cu[params.num_groups] != num_queries) {
    fail("fmd_ext::", op, ": cu_seqlens_q ends with ", cu[params.num_groups], ", accepted is ", num_queries,
         ", the length of qo_rows");
  }
}

// out=0 and lse=-inf in rows of no group.
void fill_other_rows(const BranchedAttentionParams& params, const std::vector<char>& marked) {
  const int64_t row_bytes = params.num_qo_heads * params.head_dim * (params.dtype == DType::kFloat32 ? 4 : 2);
  for (int64_t row = 0; row < params.num_rows; ++row) {
    if (marked[row]) continue;
    std::memset(static_cast<char*>(params.out) + row * row_bytes, 0, row_bytes);
    if (params.lse == nullptr) continue;
    std::fill_n(params.lse + row * params.num_qo_heads, params.num_qo_heads, -std::numeric_limits<float>::infinity());
  }
}

// Checks indices, allocates (out, lse) and calls launch.
template <typename Launch>
std::tuple<Tensor, Tensor> attend(const char* op, BranchedAttentionParams params, const Tensor& q,
                                  const Tensor& qo_rows, bool return_lse, Launch launch) {
  const int64_t num_queries = qo_rows.size(0);
  check_segments(op, params);
  check_range(op, "qo_rows", params.qo_rows, num_queries, params.num_rows, "rows of q");
  std::vector<char> marked(params.num_rows, 0);
  mark_rows(op, "qo_rows", params.qo_rows, num_queries, marked);

  const std::vector<int64_t> out_shape = {params.num_rows, params.num_qo_heads, params.head_dim};
  const std::vector<int64_t> lse_shape =
      return_lse ? std::vector<int64_t>{params.num_rows, params.num_qo_heads} : std::vector<int64_t>{0};
  Tensor out = torch::stable::new_empty(q, out_shape);
  Tensor lse = torch::stable::new_empty(q, lse_shape, ScalarType::Float);
  params.out = out.mutable_data_ptr();
  params.out_stride_row = params.num_qo_heads * params.head_dim;
  params.out_stride_head = params.head_dim;
  params.lse = return_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;
  if (num_queries < params.num_rows) fill_other_rows(params, marked);
  if (num_queries > 0) launch(params, torch_parallel_for);
  return {out, lse};
}

std::tuple<Tensor, Tensor> branched_prefill(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& qo_rows,
                                            const Tensor& cu_seqlens_q, const Tensor& segments, int64_t max_qo_len,
                                            double softmax_scale, bool return_lse) {
  const char* op = "branched_prefill";
  const BranchedAttentionParams params = attention_params(op, q, k, v, qo_rows, &cu_seqlens_q, segments, softmax_scale);
  check_cu_seqlens(op, params, qo_rows.size(0), max_qo_len);
  return attend(op, params, q, qo_rows, return_lse, launch_branched_prefill_cpu);
}

std::tuple<Tensor, Tensor> branched_decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& qo_rows,
                                           const Tensor& segments, double softmax_scale, bool return_lse) {
  const char* op = "branched_decode";
  const BranchedAttentionParams params = attention_params(op, q, k, v, qo_rows, nullptr, segments, softmax_scale);
  return attend(op, params, q, qo_rows, return_lse, launch_branched_decode_cpu);
}

void append_(Tensor k_pool, Tensor v_pool, const Tensor& k, const Tensor& v, const Tensor& slots) {
  const AppendParams params = append_params("append_", k_pool, v_pool, k, v, slots);
  check_range("append_", "slots", params.slots, params.num_rows, params.num_slots, "slots of the pool");
  if (params.num_rows > 0) launch_append_cpu(params, torch_parallel_for);
}

void rope_append_(Tensor k_pool, Tensor v_pool, Tensor q_out, const Tensor& q, const Tensor& k, const Tensor& v,
                  const Tensor& cos, const Tensor& sin, const Tensor& slots) {
  const RopeAppendParams params = rope_append_params(k_pool, v_pool, q_out, q, k, v, cos, sin, slots);
  check_range("rope_append_", "slots", params.append.slots, params.append.num_rows, params.append.num_slots,
              "slots of the pool");
  if (params.append.num_rows > 0) launch_rope_append_cpu(params, torch_parallel_for);
}

void merge_(Tensor hidden, const Tensor& home_rows, const Tensor& away_rows, const Tensor& weights) {
  const char* op = "merge_";
  const MergeParams params = merge_params(hidden, home_rows, away_rows, weights);
  check_range(op, "home_rows", params.home_rows, params.num_pairs, params.num_rows, "rows of hidden");
  check_range(op, "away_rows", params.away_rows, params.num_pairs, params.num_rows, "rows of hidden");
  std::vector<char> is_home(params.num_rows, 0);
  mark_rows(op, "home_rows", params.home_rows, params.num_pairs, is_home);
  for (int64_t j = 0; j < params.num_pairs; ++j) {
    if (!is_home[params.away_rows[j]]) continue;
    fail("fmd_ext::", op, ": away_rows[", j, "] is ", params.away_rows[j],
         ", which is also a home row; accepted are rows that are not written");
  }
  if (params.num_pairs > 0) launch_merge_cpu(params, torch_parallel_for);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmd_ext, CPU, m) {
  m.impl("append_", TORCH_BOX(&append_));
  m.impl("rope_append_", TORCH_BOX(&rope_append_));
  m.impl("branched_prefill", TORCH_BOX(&branched_prefill));
  m.impl("branched_decode", TORCH_BOX(&branched_decode));
  m.impl("merge_", TORCH_BOX(&merge_));
}

}  // namespace fmd

#pragma once

#include <cstdint>

#include "fmd/types.h"

namespace fmd {

// The keys that one group of queries sees. Query i (of qo_len) of the group attends to all prefix_len slots
// from prefix_start on, and to the first kv_len - qo_len + i + 1 slots from kv_start on.
struct KeyRanges {
  int64_t kv_start;
  int64_t kv_len;  // own keys, this call's included
  int64_t prefix_start;
  int64_t prefix_len;
};

// Attention of num_groups groups of query rows over a slot pool. Used by prefill (any qo_len) and decode (qo_len 1).
struct BranchedAttentionParams {
  DType dtype;
  int64_t num_rows;  // rows of q and out
  int64_t num_slots;
  int64_t num_qo_heads;
  int64_t num_kv_heads;  // divides num_qo_heads
  int64_t head_dim;
  int64_t num_groups;
  float softmax_scale;

  const void* q;  // [num_rows, num_qo_heads, head_dim]
  int64_t q_stride_row, q_stride_head;
  const void* k;  // [num_kv_heads, num_slots, head_dim]
  int64_t k_stride_head, k_stride_slot;
  const void* v;  // [num_kv_heads, num_slots, head_dim]
  int64_t v_stride_head, v_stride_slot;
  void* out;  // [num_rows, num_qo_heads, head_dim]
  int64_t out_stride_row, out_stride_head;
  float* lse;  // [num_rows, num_qo_heads] contiguous, natural log; may be null

  const int64_t* qo_rows;       // [cu_seqlens_q[num_groups]]: rows of q, group by group, in causal order
  const int64_t* cu_seqlens_q;  // [num_groups + 1]
  const KeyRanges* key_ranges;  // [num_groups]

  // What a device launcher may know of the lengths, since it reads no index.
  int64_t num_queries;  // length of qo_rows
  int64_t max_qo_len;   // no group has more queries
};

void launch_branched_prefill_cpu(const BranchedAttentionParams& params, ParallelFor parallel_for);

// Every group has one query: cu_seqlens_q is not read. Adjacent groups with equal prefix_start and prefix_len share
// one pass over the prefix.
void launch_branched_decode_cpu(const BranchedAttentionParams& params, ParallelFor parallel_for);

// CUDA: bfloat16 and float16 and head_dim 64 and 128, else std::invalid_argument. K, V and out: 16-byte aligned, with
// strides to match; q: any. num_queries * heads_per_kv < 2^31. Rows of out and lse in no group are written too (0 and
// -infinity) where num_queries < num_rows. workspace: as for decode below.
int64_t branched_prefill_workspace_cuda(const BranchedAttentionParams& params);
void launch_branched_prefill_cuda(const BranchedAttentionParams& params, void* workspace, void* stream);

// workspace: branched_decode_workspace_cuda(params, fixed_split) bytes, 16-byte aligned; may be reused once the launch
// has run. fixed_split: a row's keys are split as they would be if its unit, the groups that share its prefix, were
// alone in the call and the pool, so that its result does not depend on the others.
int64_t branched_decode_workspace_cuda(const BranchedAttentionParams& params, bool fixed_split);
void launch_branched_decode_cuda(const BranchedAttentionParams& params, bool fixed_split, void* workspace,
                                 void* stream);

}  // namespace fmd

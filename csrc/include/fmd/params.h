// What crosses from the host to a kernel: raw pointers, sizes and strides. No torch header, no ownership.
//
// Strides are in elements. The innermost dimension (head_dim, hidden_size) is always contiguous.
// Offsets are 64-bit everywhere: a cache of more than 2^31 elements is ordinary.
#pragma once

#include <cstdint>

namespace fmd {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// The keys that one group of queries sees. Query i (of qo_len) of the group attends to all prefix_len slots
// from prefix_start on, and to the first kv_len - qo_len + i + 1 slots from kv_start on.
struct Segment {
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
  const Segment* segments;      // [num_groups]

  // What a device launcher may know of the lengths, since it reads no index.
  int64_t num_queries;  // length of qo_rows
  int64_t max_qo_len;   // no group has more queries
};

// Writes row r of k and v into slot slots[r] of the pools.
struct AppendParams {
  DType dtype;
  int64_t num_rows, num_slots, num_kv_heads, head_dim;
  void* k_pool;  // [num_kv_heads, num_slots, head_dim]
  int64_t k_pool_stride_head, k_pool_stride_slot;
  void* v_pool;
  int64_t v_pool_stride_head, v_pool_stride_slot;
  const void* k;  // [num_rows, num_kv_heads, head_dim]
  int64_t k_stride_row, k_stride_head;
  const void* v;
  int64_t v_stride_row, v_stride_head;
  const int64_t* slots;  // [num_rows]
};

// AppendParams with rotary position embedding: of q into q_out, and of k on its way into the pool. With
// half = head_dim / 2, row r of a head x becomes, for i < half,
//   x[i] * cos[r][i] - x[i + half] * sin[r][i]  and  x[i + half] * cos[r][i + half] + x[i] * sin[r][i + half].
struct RopeAppendParams {
  AppendParams append;
  int64_t num_qo_heads;
  const void* q;  // [num_rows, num_qo_heads, head_dim]
  int64_t q_stride_row, q_stride_head;
  void* q_out;  // the same shape, no memory of q, k or v
  int64_t q_out_stride_row, q_out_stride_head;
  DType angle_dtype;  // of cos and sin: that of append, or fp32
  const void* cos;    // [num_rows, head_dim]
  int64_t cos_stride_row;
  const void* sin;
  int64_t sin_stride_row;
};

// hidden[home_rows[j]] = weights[j] * hidden[home_rows[j]] + (1 - weights[j]) * hidden[away_rows[j]], in place.
struct MergeParams {
  DType dtype;
  int64_t num_rows, hidden_size, num_pairs;
  void* hidden;  // [num_rows, hidden_size]
  int64_t stride_row;
  const int64_t* home_rows;  // [num_pairs], each row at most once
  const int64_t* away_rows;  // [num_pairs], disjoint from home_rows
  const float* weights;      // [num_pairs]
};

// Runs body(ctx, begin, end) over sub-ranges of [0, count). The caller supplies it, so that threads follow the
// host framework's setting and this folder stays free of it.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*body)(void* ctx, int64_t begin, int64_t end),
                             void* ctx);

}  // namespace fmd

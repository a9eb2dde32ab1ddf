// What a block of a prefill kernel works on: rows of one group and kv head, over the group's keys.
//
// A row is (query, head of the kv head's group), queries outermost: GQA fills the tensor-core tile and all heads share
// each K/V tile. Prefix and own segment form one sequence of keys, so no tile is split between them and none beyond the
// block's last visible key is touched.
#pragma once

#include "cuda/device/intrinsics.h"
#include "fmd/branched_attention.h"

namespace fmd::cuda {

// Kept in shared memory: the main loops have no registers to spare.
struct PrefillBlock {
  int64_t prefix_slot, own_slot;  // slot of key k: k + (k < prefix_len ? prefix_slot : own_slot)
  int64_t qo_begin;
  int prefix_len, num_keys, own_offset;
  int first_row, num_rows, heads_per_kv, kv_head;

  FMD_DEVICE int query_of(int row) const { return (first_row + row) / heads_per_kv; }

  // Number of keys that a row sees.
  FMD_DEVICE int limit_of(int row) const {
    const int own = own_offset + query_of(row);
    return prefix_len + (own > 0 ? own : 0);
  }

  // Where a row is in q, out or lse.
  FMD_DEVICE int64_t offset_of(int row, const int64_t* qo_rows, int64_t stride_row, int64_t stride_head) const {
    const int query = query_of(row);
    const int head = kv_head * heads_per_kv + (first_row + row - query * heads_per_kv);
    return qo_rows[qo_begin + query] * stride_row + head * stride_head;
  }
};

// Each block of a grid has an item, and its first thread writes it down.
struct ItemOfBlock {
  FMD_DEVICE int64_t index() const { return block_index(); }
  FMD_DEVICE bool fills() const { return thread_index() == 0; }
};

// The item at item.index() of num_row_blocks * num_groups * num_kv_heads, of kRows rows each, those with most keys
// first. The thread for which item.fills() writes it to `block`; a barrier must follow. False, for all threads alike,
// where there are no rows; then `block` stays as it is.
template <int kRows, typename Item>
FMD_DEVICE bool start_prefill_block(const BranchedAttentionParams& params, int num_row_blocks, const Item& item,
                                    PrefillBlock& block) {
  const int64_t num_columns = params.num_groups * params.num_kv_heads;
  const int row_block = num_row_blocks - 1 - static_cast<int>(item.index() / num_columns);
  const int64_t column = item.index() % num_columns;
  const int64_t group = column / params.num_kv_heads;

  const int64_t qo_begin = params.cu_seqlens_q[group];
  const int qo_len = static_cast<int>(params.cu_seqlens_q[group + 1] - qo_begin);
  const int heads_per_kv = static_cast<int>(params.num_qo_heads / params.num_kv_heads);
  const int first_row = row_block * kRows;
  const int rows_left = qo_len * heads_per_kv - first_row;
  if (rows_left <= 0) return false;
  if (item.fills()) {
    const KeyRanges ranges = params.key_ranges[group];
    block.prefix_slot = ranges.prefix_start;
    block.own_slot = ranges.kv_start - ranges.prefix_len;
    block.qo_begin = qo_begin;
    block.prefix_len = static_cast<int>(ranges.prefix_len);
    block.own_offset = static_cast<int>(ranges.kv_len) - qo_len + 1;
    block.first_row = first_row;
    block.num_rows = rows_left < kRows ? rows_left : kRows;
    block.heads_per_kv = heads_per_kv;
    block.kv_head = static_cast<int>(column % params.num_kv_heads);
    block.num_keys = block.limit_of(block.num_rows - 1);
  }
  return true;
}

}  // namespace fmd::cuda

// Attention of query groups to a prefix and, causally, to their own segment.
//
// A block takes 128 rows of one group and kv head. A row is (query, head of the kv head's group), queries outermost:
// GQA fills the tensor-core tile and all heads share each K/V tile. Prefix and own segment form one sequence of keys,
// so no tile is split between them and none beyond the block's last visible key is touched.
//
// K and V tiles alternate in a ring of kSlots shared tiles: while one is used, kSlots - 1 are on their way.
#pragma once

#include "cuda/attention_tile.cuh"
#include "fmd/params.h"

namespace fmd::cuda {

// What a block knows about its rows and keys. Kept in shared memory: the main loop has no registers to spare.
struct PrefillBlock {
  int64_t prefix_slot, own_slot;  // slot of key k: k + (k < prefix_len ? prefix_slot : own_slot)
  int64_t qo_begin;
  int prefix_len, num_keys, own_offset;
  int first_row, num_rows, group_size, kv_head;

  FMD_DEVICE int query_of(int row) const { return (first_row + row) / group_size; }

  // Number of keys that a row sees.
  FMD_DEVICE int limit_of(int row) const {
    const int own = own_offset + query_of(row);
    return prefix_len + (own > 0 ? own : 0);
  }

  // Where a row is in q, out or lse.
  FMD_DEVICE int64_t offset_of(int row, const int64_t* qo_rows, int64_t stride_row, int64_t stride_head) const {
    const int query = query_of(row);
    const int head = kv_head * group_size + (first_row + row - query * group_size);
    return qo_rows[qo_begin + query] * stride_row + head * stride_head;
  }
};

template <int kDim>
struct PrefillShape {
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRowTiles = 2;  // of 16 rows per warp: each K/V fragment is used twice
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kKeys = 64;
  static constexpr int kSlots = 3;
  static constexpr int kTileBytes = (kRows + kSlots * kKeys) * kDim * 2;
  static constexpr int kSharedBytes = kTileBytes + sizeof(PrefillBlock);
};

template <typename T, int kDim>
FMD_KERNEL(PrefillShape<kDim>::kThreads, 2)
branched_prefill_kernel(const BranchedAttentionParams params, const int num_row_blocks, const bool q_is_aligned) {
  using Shape = PrefillShape<kDim>;
  using State = RowState<T, kDim, Shape::kRowTiles, Shape::kKeys>;
  constexpr int kRowVecs = kDim / kVecElements;
  constexpr int kPassRows = Shape::kThreads / kRowVecs;  // rows that all threads copy at once, a vector each

  // The blocks with most keys first.
  const int64_t num_columns = params.num_groups * params.num_kv_heads;
  const int row_block = num_row_blocks - 1 - static_cast<int>(block_index() / num_columns);
  const int64_t column = block_index() % num_columns;
  const int64_t group = column / params.num_kv_heads;
  const int kv_head = static_cast<int>(column % params.num_kv_heads);

  const int64_t qo_begin = params.cu_seqlens_q[group];
  const int qo_len = static_cast<int>(params.cu_seqlens_q[group + 1] - qo_begin);
  const int group_size = static_cast<int>(params.num_qo_heads / params.num_kv_heads);
  const int first_row = row_block * Shape::kRows;
  const int rows_left = qo_len * group_size - first_row;
  if (rows_left <= 0) return;
  const int num_rows = rows_left < Shape::kRows ? rows_left : Shape::kRows;

  const int thread = thread_index();
  const int warp = thread / kWarpSize, lane = thread % kWarpSize;
  T* q_tile = shared_memory<T>();
  T* ring = q_tile + Shape::kRows * kDim;
  PrefillBlock& block = *reinterpret_cast<PrefillBlock*>(shared_memory<unsigned char>() + Shape::kTileBytes);
  if (thread == 0) {
    const Segment segment = params.segments[group];
    block.prefix_slot = segment.prefix_start;
    block.own_slot = segment.kv_start - segment.prefix_len;
    block.qo_begin = qo_begin;
    block.prefix_len = static_cast<int>(segment.prefix_len);
    block.own_offset = static_cast<int>(segment.kv_len) - qo_len + 1;
    block.first_row = first_row;
    block.num_rows = num_rows;
    block.group_size = group_size;
    block.kv_head = kv_head;
    block.num_keys = block.limit_of(num_rows - 1);
  }
  block_barrier();
  const int num_tiles = (block.num_keys + Shape::kKeys - 1) / Shape::kKeys;
  const int first_masked_tile = block.limit_of(0) / Shape::kKeys;

  const auto copy_q = [&] {
    const int vec = thread % kRowVecs;
    for (int row = thread / kRowVecs; row < Shape::kRows; row += kPassRows) {
      T* to = q_tile + swizzled<kDim>(row, vec);
      const bool valid = row < block.num_rows;
      const T* from = static_cast<const T*>(params.q);
      if (valid) {
        from += block.offset_of(row, params.qo_rows, params.q_stride_row, params.q_stride_head) + vec * kVecElements;
      }
      if (q_is_aligned || !valid) {
        copy_async_16(to, from, valid);
      } else {
        for (int i = 0; i < kVecElements; ++i) to[i] = from[i];
      }
    }
  };

  // Half-tiles: K of tile 0, V of tile 0, K of tile 1, ...
  const auto slot_of = [&](int half) { return ring + half % Shape::kSlots * (Shape::kKeys * kDim); };
  const auto copy_half = [&](int half) {
    if (half < 2 * num_tiles) {
      const bool is_v = half % 2 != 0;
      const T* pool = static_cast<const T*>(is_v ? params.v : params.k);
      const int64_t stride_slot = is_v ? params.v_stride_slot : params.k_stride_slot;
      const int vec = thread % kRowVecs;
      const T* from = pool + block.kv_head * (is_v ? params.v_stride_head : params.k_stride_head) + vec * kVecElements;
      T* tile = slot_of(half);
      const int first_key = half / 2 * Shape::kKeys;
      const int prefix_len = block.prefix_len, num_keys = block.num_keys;
      const int64_t prefix_slot = block.prefix_slot, own_slot = block.own_slot;
#pragma unroll
      for (int pass = 0; pass < Shape::kKeys / kPassRows; ++pass) {
        const int row = pass * kPassRows + thread / kRowVecs;
        const int key = first_key + row;
        const int64_t slot = key + (key < prefix_len ? prefix_slot : own_slot);
        const bool valid = key < num_keys;
        copy_async_16(tile + swizzled<kDim>(row, vec), valid ? from + slot * stride_slot : pool, valid);
      }
    }
    copy_async_commit();
  };
  // Half-tile `half` is there for all, and all have done with the one before it, whose slot the next copy takes.
  const auto next_half = [&](int half) {
    copy_async_wait<Shape::kSlots - 2>();
    block_barrier();
    copy_half(half + Shape::kSlots - 1);
    return slot_of(half);
  };

  State state;
  state.start();
  const Scale scale = score_scale(params.softmax_scale);
  const SharedAddress q_row = rows_address<kDim>(q_tile + warp * Shape::kWarpRows * kDim);
  const auto q_fragment = [&](uint32_t (&fragment)[4], int row_tile, int step) {
    load_matrices(fragment, vecs_on(q_row, step * 2) + row_tile * 16 * kDim * sizeof(T));
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] ^= scale.q_sign;
  };
  // The two rows of this lane in a row tile.
  const auto lane_row = [&](int row_tile, int half) {
    return warp * Shape::kWarpRows + row_tile * 16 + half * 8 + lane / 4;
  };

  if (num_tiles > 0) {
    copy_q();
    for (int half = 0; half < Shape::kSlots - 1; ++half) copy_half(half);
  }
  for (int tile = 0; tile < num_tiles; ++tile) {
    typename State::Scores scores;
    State::score(scores, next_half(2 * tile), q_fragment);
    if (tile >= first_masked_tile) {
#pragma unroll
      for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int limit = block.limit_of(lane_row(r, half)) - tile * Shape::kKeys - lane % 4 * 2;
#pragma unroll
          for (int n = 0; n < Shape::kKeys / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              if (n * 8 + i >= limit) scores[r][n][2 * half + i] = negative_infinity();
            }
          }
        }
      }
    }
    state.weigh(scores, scale.log2);
    state.accumulate(scores, next_half(2 * tile + 1));
  }
  state.finish();
  copy_async_wait<0>();

  // Through shared memory, so that rows leave in whole vectors. Each warp overwrites its own rows of q only.
  T* const out_tile = q_tile + warp * Shape::kWarpRows * kDim;
  warp_barrier();
#pragma unroll
  for (int r = 0; r < Shape::kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = state.sum[r][half];
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
      const int row = r * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
        const uint32_t pair = pack<T>(state.out[r][d][2 * half] * inverse, state.out[r][d][2 * half + 1] * inverse);
        *reinterpret_cast<uint32_t*>(out_tile + swizzled<kDim>(row, d) + lane % 4 * 2) = pair;
      }
      const int block_row = lane_row(r, half);
      if (params.lse != nullptr && lane % 4 == 0 && block_row < block.num_rows) {
        const float lse =
            sum == 0.0f ? negative_infinity() : (state.maximum[r][half] * scale.log2) * kLn2 + log_accurate(sum);
        params.lse[block.offset_of(block_row, params.qo_rows, params.num_qo_heads, 1)] = lse;
      }
    }
  }
  warp_barrier();
  const int vec = lane % kRowVecs;
  for (int row = lane / kRowVecs; row < Shape::kWarpRows; row += kWarpSize / kRowVecs) {
    const int block_row = warp * Shape::kWarpRows + row;
    if (block_row >= block.num_rows) break;
    T* to = static_cast<T*>(params.out) +
            block.offset_of(block_row, params.qo_rows, params.out_stride_row, params.out_stride_head);
    *reinterpret_cast<Vec16*>(to + vec * kVecElements) =
        *reinterpret_cast<const Vec16*>(out_tile + swizzled<kDim>(row, vec));
  }
}

}  // namespace fmd::cuda

// Attention of query groups to a prefix and, causally, to their own segment: sm_80 and later.
//
// A block takes 128 rows (see prefill_block.cuh). K and V tiles alternate in a ring of kSlots shared tiles: while one
// is used, kSlots - 1 are on their way.
#pragma once

#include "cuda/attention_tile.cuh"
#include "cuda/prefill_block.cuh"
#include "fmd/branched_attention.h"

namespace fmd::cuda {

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

  const int thread = thread_index();
  const int warp = thread / kWarpSize, lane = thread % kWarpSize;
  T* q_tile = shared_memory<T>();
  T* ring = q_tile + Shape::kRows * kDim;
  PrefillBlock& block = *reinterpret_cast<PrefillBlock*>(shared_memory<unsigned char>() + Shape::kTileBytes);
  if (!start_prefill_block<Shape::kRows>(params, num_row_blocks, ItemOfBlock{}, block)) return;
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
    state.online_softmax(scores, scale.log2, [&](int r, int half, float factor) { state.rescale(r, half, factor); });
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
      const float inverse = state.inverse_sum(r, half);
      const int row = r * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
        const uint32_t pair = pack<T>(state.out[r][d][2 * half] * inverse, state.out[r][d][2 * half + 1] * inverse);
        *reinterpret_cast<uint32_t*>(out_tile + swizzled<kDim>(row, d) + lane % 4 * 2) = pair;
      }
      const int block_row = lane_row(r, half);
      if (params.lse != nullptr && lane % 4 == 0 && block_row < block.num_rows) {
        params.lse[block.offset_of(block_row, params.qo_rows, params.num_qo_heads, 1)] = state.lse(r, half, scale.log2);
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

// Attention of one query per group: a block's share of the tiles of a unit, and what its four warps make of it.
#pragma once

#include "cuda/sm80/branched_decode.cuh"

namespace fmd::cuda {

// A row's maximum, each warp's weight in it, and its sum, over the block's warps; 0 where none saw a key.
FMD_DEVICE float maximum_of(const DecodeUnit& unit, int row) {
  float maximum = unit.maximum[0][row];
#pragma unroll
  for (int w = 1; w < kDecodeWarps; ++w) maximum = fmaxf(maximum, unit.maximum[w][row]);
  return maximum;
}
FMD_DEVICE float weight_of(const DecodeUnit& unit, int warp, int row, float maximum) {
  return unit.sum[warp][row] == 0.0f ? 0.0f : exp2_fast(unit.maximum[warp][row] - maximum);
}
FMD_DEVICE float sum_of(const DecodeUnit& unit, int row) {
  const float maximum = maximum_of(unit, row);
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kDecodeWarps; ++w) total += unit.sum[w][row] * weight_of(unit, w, row, maximum);
  return total;
}

// By one thread; a barrier must follow.
FMD_DEVICE void fill_unit(const BranchedAttentionParams& params, int group, int heads_per_kv, DecodeUnit& unit) {
  find_unit(params, group, heads_per_kv, &unit.leader, &unit.num_groups);
  const KeyRanges first = params.key_ranges[unit.leader];
  unit.begin[0] = 0;
  unit.first_slot[0] = first.prefix_start;
  int keys = static_cast<int>(first.prefix_len);
  for (int i = 0; i < unit.num_groups; ++i) {
    const KeyRanges ranges = params.key_ranges[unit.leader + i];
    unit.begin[i + 1] = keys;
    unit.first_slot[i + 1] = ranges.kv_start - keys;
    keys += static_cast<int>(ranges.kv_len);
  }
  unit.begin[unit.num_groups + 1] = keys;
  unit.num_keys = keys;
}

// Row r of a unit's tile: head r of its first group, and so on; or, with several head tiles, head 16 * tile + r.
struct UnitRows {
  int num_groups, heads_per_kv, head_tile, num_head_tiles;

  FMD_DEVICE int group_of(int row) const { return num_head_tiles > 1 ? 0 : row / heads_per_kv; }
  FMD_DEVICE int head_of(int row) const {
    return num_head_tiles > 1 ? head_tile * kUnitRows + row : row % heads_per_kv;
  }
  FMD_DEVICE bool is_row(int row) const { return group_of(row) < num_groups && head_of(row) < heads_per_kv; }
};

// Attention of the unit's rows to tiles [tile_begin, tile_end). Afterwards unit.maximum and unit.sum hold each warp's
// results, and the vectors [kWarps, kUnitRows, kDim] at `memory`, times their weights, add up to the block's.
// memory: kRingBytes; each warp runs through tiles of its own with its own pipeline.
template <typename T, int kDim>
FMD_DEVICE void decode_tiles(const BranchedAttentionParams& params, DecodeUnit& unit, const UnitRows& rows,
                             int64_t kv_head, int tile_begin, int tile_end, unsigned char* memory, bool q_is_aligned) {
  using Shape = DecodeShape<kDim>;
  using State = RowState<T, kDim, 1, Shape::kKeys>;
  constexpr int kRowVecs = kDim / kVecElements;
  constexpr int kPassRows = kWarpSize / kRowVecs;
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  T* ring = reinterpret_cast<T*>(memory) + warp * Shape::kStages * 2 * Shape::kTileElements;
  const int heads_per_kv = rows.heads_per_kv;
  const int num_runs = unit.num_groups + 1;
  const int prefix_len = unit.begin[1];
  const int num_keys = unit.num_keys;

  // This warp's tiles: tile_begin + warp, and every fourth after it. K, then V, of a stage.
  const auto stage = [&](int i) { return ring + i % Shape::kStages * (2 * Shape::kTileElements); };
  const auto copy_tile = [&](int i) {
    const int tile = tile_begin + warp + i * Shape::kWarps;
    if (tile < tile_end) {
      const int vec = lane % kRowVecs;
      const T* k = static_cast<const T*>(params.k) + kv_head * params.k_stride_head + vec * kVecElements;
      const T* v = static_cast<const T*>(params.v) + kv_head * params.v_stride_head + vec * kVecElements;
      T* to = stage(i);
#pragma unroll
      for (int pass = 0; pass < Shape::kKeys / kPassRows; ++pass) {
        const int row = pass * kPassRows + lane / kRowVecs;
        const int key = tile * Shape::kKeys + row;
        const bool valid = key < num_keys;
        int run = 0;
        while (run + 1 < num_runs && key >= unit.begin[run + 1]) ++run;
        const int64_t slot = valid ? unit.first_slot[run] + key : 0;
        const int place = swizzled<kDim>(row, vec);
        copy_async_16(to + place, k + slot * params.k_stride_slot, valid);
        copy_async_16(to + Shape::kTileElements + place, v + slot * params.v_stride_slot, valid);
      }
    }
    copy_async_commit();
  };
  for (int i = 0; i < Shape::kStages - 1; ++i) copy_tile(i);  // under way while q is read

  // q as A fragments, and the keys that this lane's two rows see besides the prefix.
  const Scale scale = score_scale(params.softmax_scale);
  uint32_t q[kDim / 16][4];
  int own_begin[2], own_end[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = half * 8 + lane / 4;
    const bool valid = rows.is_row(row);
    const int member = valid ? rows.group_of(row) : 0;
    own_begin[half] = unit.begin[member + 1];
    own_end[half] = unit.begin[member + 2];
    const T* from = static_cast<const T*>(params.q);
    if (valid) {
      from += params.qo_rows[unit.leader + member] * params.q_stride_row +
              (kv_head * heads_per_kv + rows.head_of(row)) * params.q_stride_head;
    }
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
#pragma unroll
      for (int part_of_16 = 0; part_of_16 < 2; ++part_of_16) {
        const T* pair = from + step * 16 + part_of_16 * 8 + lane % 4 * 2;
        uint32_t bits = 0;
        if (valid && q_is_aligned) {
          bits = *reinterpret_cast<const uint32_t*>(pair);
        } else if (valid) {
          bits = pair[0].bits | static_cast<uint32_t>(pair[1].bits) << 16;
        }
        q[step][half + 2 * part_of_16] = bits ^ scale.q_sign;
      }
    }
  }
  const auto q_fragment = [&](uint32_t (&fragment)[4], int, int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = q[step][i];
  };

  State state;
  state.start();
  for (int i = 0; tile_begin + warp + i * Shape::kWarps < tile_end; ++i) {
    copy_async_wait<Shape::kStages - 2>();
    warp_barrier();
    copy_tile(i + Shape::kStages - 1);
    const T* k_tile = stage(i);
    typename State::Scores scores;
    State::score(scores, k_tile, q_fragment);
    const int first_key = (tile_begin + warp + i * Shape::kWarps) * Shape::kKeys;
    if (first_key + Shape::kKeys > prefix_len) {
#pragma unroll
      for (int n = 0; n < Shape::kKeys / 8; ++n) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int key = first_key + n * 8 + lane % 4 * 2 + c % 2;
          const bool visible = key < prefix_len || (key >= own_begin[c / 2] && key < own_end[c / 2]);
          if (!visible) scores[0][n][c] = negative_infinity();
        }
      }
    }
    state.online_softmax(scores, scale.log2, [&](int r, int half, float factor) { state.rescale(r, half, factor); });
    state.accumulate(scores, k_tile + Shape::kTileElements);
  }
  state.finish();
  copy_async_wait<0>();

  // The four warps' results become one. Their vectors take the place of the rings.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (lane % 4 == 0) {
      unit.maximum[warp][half * 8 + lane / 4] = state.maximum[0][half] * scale.log2;
      unit.sum[warp][half * 8 + lane / 4] = state.sum[0][half];
    }
  }
  block_barrier();
  float* vectors = reinterpret_cast<float*>(memory);  // [warp, row, kDim]
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = half * 8 + lane / 4;
    const float weight = weight_of(unit, warp, row, maximum_of(unit, row));
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      float* to = vectors + (warp * kUnitRows + row) * kDim + d * 8 + lane % 4 * 2;
      to[0] = state.out[0][d][2 * half] * weight;
      to[1] = state.out[0][d][2 * half + 1] * weight;
    }
  }
  block_barrier();
}

}  // namespace fmd::cuda

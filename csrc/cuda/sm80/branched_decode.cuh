// Attention of one query per group, split over the keys, and the combine of the splits.
//
// Neighbouring groups that share their prefix form a unit: as many of them as fit with all heads of a kv head into the
// 16 rows of a tensor-core tile. Their keys form one sequence, the prefix and then each group's own segment, of which a
// row sees the prefix and its own part: the prefix is read once. A group of more than 16 heads takes several tiles.
//
// The grid is sized without knowing a length: num_splits blocks per group, kv head and head tile; the blocks of a
// unit's groups share the unit's keys evenly. Each warp of a block runs through tiles of its own with its own pipeline.
#pragma once

#include "cuda/attention_tile.cuh"
#include "fmd/branched_attention.h"

namespace fmd::cuda {

constexpr int kUnitRows = 16;
constexpr int kDecodeWarps = 4;

template <int kDim>
struct DecodeShape {
  static constexpr int kWarps = kDecodeWarps;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kKeys = 16;  // of a warp's tile
  static constexpr int kStages = 3;
  static constexpr int kTileElements = kKeys * kDim;
  static constexpr int kRingBytes = kWarps * kStages * 2 * kTileElements * 2;
};

// The runs of keys of a unit: the prefix, then one per group.
struct DecodeUnit {
  int leader;      // first group
  int num_groups;  // at most kUnitRows
  int num_keys;
  int begin[kUnitRows + 2];                // [run]: first key; and the end
  int64_t first_slot[kUnitRows + 1];       // [run]: slot of key k is first_slot + k
  float maximum[kDecodeWarps][kUnitRows];  // [warp][row]
  float sum[kDecodeWarps][kUnitRows];
};

template <int kDim>
constexpr int decode_shared_bytes() {
  return DecodeShape<kDim>::kRingBytes + static_cast<int>(sizeof(DecodeUnit));
}

// What splits leave for the combine, in rows of kUnitRows per block: a maximum in base 2 (scaled), a sum, and a vector.
struct DecodePartials {
  float* out;      // [blocks, kUnitRows, head_dim]
  float* maximum;  // [blocks, kUnitRows]
  float* sum;      // [blocks, kUnitRows]; 0: no key was seen, out is not written
  int num_splits;
  int num_head_tiles;  // of 16 heads, per kv head

  FMD_DEVICE int64_t block_of(int64_t group, int split, int64_t kv_head, int64_t num_kv_heads, int head_tile) const {
    return ((group * num_splits + split) * num_kv_heads + kv_head) * num_head_tiles + head_tile;
  }
};

FMD_DEVICE bool share_prefix(const KeyRanges& a, const KeyRanges& b) {
  return a.prefix_len > 0 && a.prefix_len == b.prefix_len && a.prefix_start == b.prefix_start;
}

// First group of the unit that `group` belongs to, and the number of its groups.
FMD_DEVICE void find_unit(const BranchedAttentionParams& params, int group, int heads_per_kv, int* leader, int* count) {
  const int capacity = heads_per_kv >= kUnitRows ? 1 : kUnitRows / heads_per_kv;
  *leader = group;
  *count = 1;
  if (capacity == 1) return;
  const KeyRanges own = params.key_ranges[group];
  int first = group;
  while (first > 0 && share_prefix(own, params.key_ranges[first - 1])) --first;
  *leader = first + (group - first) / capacity * capacity;
  int end = group + 1;
  while (end < params.num_groups && end - *leader < capacity && share_prefix(own, params.key_ranges[end])) ++end;
  *count = end - *leader;
}

template <typename T, int kDim>
FMD_KERNEL(DecodeShape<kDim>::kThreads, 1)
branched_decode_kernel(const BranchedAttentionParams params, const DecodePartials partials, const bool q_is_aligned) {
  using Shape = DecodeShape<kDim>;
  using State = RowState<T, kDim, 1, Shape::kKeys>;
  constexpr int kRowVecs = kDim / kVecElements;
  constexpr int kPassRows = kWarpSize / kRowVecs;

  const int heads_per_kv = static_cast<int>(params.num_qo_heads / params.num_kv_heads);
  int64_t rest = block_index();
  const int head_tile = static_cast<int>(rest % partials.num_head_tiles);
  rest /= partials.num_head_tiles;
  const int64_t kv_head = rest % params.num_kv_heads;
  rest /= params.num_kv_heads;
  const int split = static_cast<int>(rest % partials.num_splits);
  const int group = static_cast<int>(rest / partials.num_splits);

  const int thread = thread_index();
  const int warp = thread / kWarpSize, lane = thread % kWarpSize;
  unsigned char* memory = shared_memory<unsigned char>();
  T* ring = reinterpret_cast<T*>(memory) + warp * Shape::kStages * 2 * Shape::kTileElements;
  DecodeUnit& unit = *reinterpret_cast<DecodeUnit*>(memory + Shape::kRingBytes);

  if (thread == 0) {
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
  block_barrier();

  const int num_runs = unit.num_groups + 1;
  const int prefix_len = unit.begin[1];
  const int num_keys = unit.num_keys;
  const int num_tiles = (num_keys + Shape::kKeys - 1) / Shape::kKeys;
  const int num_parts = unit.num_groups * partials.num_splits;
  const int part = (group - unit.leader) * partials.num_splits + split;
  const int tile_begin = static_cast<int>(static_cast<int64_t>(num_tiles) * part / num_parts);
  const int tile_end = static_cast<int>(static_cast<int64_t>(num_tiles) * (part + 1) / num_parts);

  // Row r of the tile: head r of the unit's first group, and so on; or, with several head tiles, head 16 * tile + r.
  const auto group_of = [&](int row) { return partials.num_head_tiles > 1 ? 0 : row / heads_per_kv; };
  const auto head_of = [&](int row) {
    return partials.num_head_tiles > 1 ? head_tile * kUnitRows + row : row % heads_per_kv;
  };
  const auto is_row = [&](int row) { return group_of(row) < unit.num_groups && head_of(row) < heads_per_kv; };

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
    const bool valid = is_row(row);
    const int member = valid ? group_of(row) : 0;
    own_begin[half] = unit.begin[member + 1];
    own_end[half] = unit.begin[member + 2];
    const T* from = static_cast<const T*>(params.q);
    if (valid) {
      from += params.qo_rows[unit.leader + member] * params.q_stride_row +
              (kv_head * heads_per_kv + head_of(row)) * params.q_stride_head;
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
  const auto maximum_of = [&](int row) {
    float maximum = unit.maximum[0][row];
#pragma unroll
    for (int w = 1; w < Shape::kWarps; ++w) maximum = fmaxf(maximum, unit.maximum[w][row]);
    return maximum;
  };
  const auto weight_of = [&](int w, int row, float maximum) {
    return unit.sum[w][row] == 0.0f ? 0.0f : exp2_fast(unit.maximum[w][row] - maximum);
  };
  float* vectors = reinterpret_cast<float*>(memory);  // [warp, row, kDim]
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = half * 8 + lane / 4;
    const float weight = weight_of(warp, row, maximum_of(row));
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      float* to = vectors + (warp * kUnitRows + row) * kDim + d * 8 + lane % 4 * 2;
      to[0] = state.out[0][d][2 * half] * weight;
      to[1] = state.out[0][d][2 * half + 1] * weight;
    }
  }
  block_barrier();
  const auto sum_of = [&](int row) {
    const float maximum = maximum_of(row);
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) total += unit.sum[w][row] * weight_of(w, row, maximum);
    return total;
  };
  const int64_t first_partial = block_index() * kUnitRows;
  for (int i = thread; i < kUnitRows * kDim; i += Shape::kThreads) {
    const int row = i / kDim;
    if (!is_row(row)) break;  // valid rows come first
    if (sum_of(row) == 0.0f) continue;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) total += vectors[w * kUnitRows * kDim + i];
    partials.out[first_partial * kDim + i] = total;
  }
  if (thread < kUnitRows && is_row(thread)) {
    partials.maximum[first_partial + thread] = maximum_of(thread);
    partials.sum[first_partial + thread] = sum_of(thread);
  }
}

constexpr int kCombineWarps = 4;
constexpr int kCombineSharedBytes = kCombineWarps * kWarpSize * static_cast<int>(sizeof(float));
// Vectors that a warp reads at once. A unit has a hundred parts, and one after the other each would take as long as the
// way to memory and back.
constexpr int kCombineReads = 8;

// A lane's share of a vector.
template <int kDims>
struct alignas(sizeof(float) * kDims) LaneDims {
  float dim[kDims];
};

// A warp per group and query head: out = sum of out_i 2^(maximum_i - maximum) / sum of sum_i 2^(maximum_i - maximum).
template <typename T, int kDim>
FMD_KERNEL(kCombineWarps* kWarpSize, 1)
branched_decode_combine_kernel(const BranchedAttentionParams params, const DecodePartials partials) {
  constexpr int kLaneDims = kDim / kWarpSize;
  using Vec = LaneDims<kLaneDims>;
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  const int64_t item = block_index() * kCombineWarps + warp;
  if (item >= params.num_groups * params.num_qo_heads) return;
  const int group = static_cast<int>(item / params.num_qo_heads);
  const int qo_head = static_cast<int>(item % params.num_qo_heads);
  const int heads_per_kv = static_cast<int>(params.num_qo_heads / params.num_kv_heads);
  const int kv_head = qo_head / heads_per_kv, head = qo_head % heads_per_kv;

  int leader, num_groups;
  find_unit(params, group, heads_per_kv, &leader, &num_groups);
  const int head_tile = head / kUnitRows;
  const int row = head % kUnitRows + (group - leader) * heads_per_kv;
  const int num_parts = num_groups * partials.num_splits;
  const auto partial_of = [&](int part) {
    return partials.block_of(leader, part, kv_head, params.num_kv_heads, head_tile) * kUnitRows + row;
  };

  float maximum = negative_infinity();
  for (int part = lane; part < num_parts; part += kWarpSize) {
    maximum = fmaxf(maximum, partials.maximum[partial_of(part)]);
  }
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) maximum = fmaxf(maximum, shuffle_xor(maximum, mask));

  // A weight per lane and part, then all lanes over the vectors of these parts.
  float* weights = shared_memory<float>() + warp * kWarpSize;
  const Vec* vectors = reinterpret_cast<const Vec*>(partials.out) + lane;
  float sum = 0.0f, out[kLaneDims] = {};
  for (int first = 0; first < num_parts; first += kWarpSize) {
    const int last = (num_parts < first + kWarpSize ? num_parts : first + kWarpSize) - 1;
    float weight = 0.0f;
    if (first + lane <= last) {
      const int64_t partial = partial_of(first + lane);
      const float own_sum = partials.sum[partial];
      if (own_sum != 0.0f) weight = exp2_fast(partials.maximum[partial] - maximum);
      sum += own_sum * weight;
    }
    warp_barrier();
    weights[lane] = weight;
    warp_barrier();
    for (int part = first; part <= last; part += kCombineReads) {
      Vec read[kCombineReads];
#pragma unroll
      for (int i = 0; i < kCombineReads; ++i) {
        read[i] = vectors[partial_of(part + i < last ? part + i : last) * kWarpSize];
      }
#pragma unroll
      for (int i = 0; i < kCombineReads; ++i) {
        const float own_weight = weights[part - first + i];
        if (own_weight == 0.0f) continue;  // then the vector may be anything
#pragma unroll
        for (int d = 0; d < kLaneDims; ++d) out[d] += read[i].dim[d] * own_weight;
      }
    }
  }
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) sum += shuffle_xor(sum, mask);
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  const int64_t q_row = params.qo_rows[group];
  T* to = static_cast<T*>(params.out) + q_row * params.out_stride_row + qo_head * params.out_stride_head;
#pragma unroll
  for (int i = 0; i < kLaneDims; i += 2) {
    *reinterpret_cast<uint32_t*>(to + lane * kLaneDims + i) = pack<T>(out[i] * inverse, out[i + 1] * inverse);
  }
  if (params.lse != nullptr && lane == 0) {
    params.lse[q_row * params.num_qo_heads + qo_head] =
        sum == 0.0f ? negative_infinity() : maximum * kLn2 + log_accurate(sum);
  }
}

}  // namespace fmd::cuda

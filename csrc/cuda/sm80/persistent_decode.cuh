// branched_decode with equal work for every block, whatever the lengths.
//
// All tiles of all units, kv heads and head tiles form one sequence, which as many blocks as the device runs at once
// share evenly. Every block finds its share by itself: a scan over the groups' lengths, which only the device knows. A
// block that comes to all tiles of a unit writes the result; of others it leaves a partial result, at most two in all,
// and the combine, a kernel of its own that is in place before this one ends, adds up the parts. No atomics, nothing to
// reset: a launch needs no more than memory of its own, in a graph too.
//
// A fixed split gives every unit a number of parts by its own length, and the parts to the blocks in turn: then a
// result does not depend on what else is in the call.
#pragma once

#include "cuda/device/grid.h"
#include "cuda/sm80/decode_tiles.cuh"

namespace fmd::cuda {

// Two tiles for each warp of a block; fewer are not worth their place in the combine.
constexpr int64_t kLeastTiles = 2 * kDecodeWarps;
// Of a fixed split: tiles of a part, as long as a unit has no more than kFixedParts for each of its groups.
constexpr int64_t kFixedTiles = 16;
constexpr int64_t kFixedParts = 16;
// Beyond that the scan would take too long; so many groups fill a device by themselves.
constexpr int64_t kMaxScannedGroups = 4096;

// What the blocks leave for the combine, in rows of kUnitRows per part: a maximum in base 2 (scaled), a sum, a vector.
struct PersistentWorkspace {
  int64_t* first;  // [num_groups + 1]: as scan_work() leaves it
  float* out;      // [parts, kUnitRows, head_dim]
  float* maximum;  // [parts, kUnitRows]
  float* sum;      // [parts, kUnitRows]; 0: no key was seen, out is not written
  int num_blocks;
  int num_head_tiles;  // of 16 heads, per kv head
  bool fixed_split;
};

// Places: work of group g's unit lies at first[g] * columns, column by column (kv head, head tile), where its work is
// the number of its tiles, or of its parts with a fixed split.
struct Places {
  int64_t total, blocks, columns;

  FMD_DEVICE Places(const BranchedAttentionParams& params, const PersistentWorkspace& workspace, int64_t all) {
    columns = params.num_kv_heads * workspace.num_head_tiles;
    total = all * columns;
    const int64_t most = (total + kLeastTiles - 1) / kLeastTiles;
    blocks = most < workspace.num_blocks ? most : workspace.num_blocks;
  }

  // The places of an equal split: block b has those from begin_of(b) to begin_of(b + 1).
  FMD_DEVICE int64_t begin_of(int64_t block) const { return total * block / blocks; }
  FMD_DEVICE int64_t block_of(int64_t place) const { return ((place + 1) * blocks - 1) / total; }

  // Where the parts of a fixed split have their partial results.
  FMD_DEVICE int64_t fixed_part_of(int leader, int num_groups, int64_t column) const {
    return (leader * columns + column * num_groups) * kFixedParts;
  }
};

// first[g + 1] - first[g] = the work of the unit that group g leads, 0 where it leads none. scratch: [threads].
template <typename Shape>
FMD_DEVICE void scan_work(const BranchedAttentionParams& params, int heads_per_kv, bool fixed_split, int64_t* first,
                          int64_t* scratch) {
  const int thread = thread_index();
  const int num_groups = static_cast<int>(params.num_groups);
  const int per_thread = (num_groups + Shape::kThreads - 1) / Shape::kThreads;
  const int begin = thread * per_thread < num_groups ? thread * per_thread : num_groups;
  const int end = begin + per_thread < num_groups ? begin + per_thread : num_groups;
  int64_t own = 0;
  for (int group = begin; group < end; ++group) {
    int leader, count;
    find_unit(params, group, heads_per_kv, &leader, &count);
    int64_t work = 0;
    if (leader == group) {
      int64_t keys = params.key_ranges[group].prefix_len;
      for (int i = 0; i < count; ++i) keys += params.key_ranges[group + i].kv_len;
      work = (keys + Shape::kKeys - 1) / Shape::kKeys;
      if (fixed_split) {
        const int64_t parts = (work + kFixedTiles - 1) / kFixedTiles;
        work = parts < kFixedParts * count ? parts : kFixedParts * count;
      }
    }
    first[group + 1] = work;
    own += work;
  }
  scratch[thread] = own;
  block_barrier();
  for (int distance = 1; distance < Shape::kThreads && distance * per_thread < num_groups; distance *= 2) {
    const int64_t before = thread >= distance ? scratch[thread - distance] : 0;
    block_barrier();
    scratch[thread] += before;
    block_barrier();
  }
  int64_t sum = scratch[thread] - own;
  for (int group = begin; group < end; ++group) {
    sum += first[group + 1];
    first[group + 1] = sum;
  }
  if (thread == 0) first[0] = 0;
  block_barrier();
}

// The group that leads the unit at `place`: the last one that begins at or before it.
FMD_DEVICE int leader_at(const int64_t* first, int num_groups, int64_t columns, int64_t place) {
  int low = 0, high = num_groups - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first[middle] * columns <= place) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// What a block adds up in shared memory, as the result of the unit's rows: these tiles were all there are.
template <typename T, int kDim>
FMD_DEVICE void write_rows(const BranchedAttentionParams& params, const DecodeUnit& unit, const UnitRows& rows,
                           int64_t kv_head, const float* vectors) {
  using Shape = DecodeShape<kDim>;
  for (int i = thread_index() * 2; i < kUnitRows * kDim; i += Shape::kThreads * 2) {
    const int row = i / kDim;
    if (!rows.is_row(row)) break;  // valid rows come first
    const float sum = sum_of(unit, row);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    float low = 0.0f, high = 0.0f;
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) {
      low += vectors[w * kUnitRows * kDim + i];
      high += vectors[w * kUnitRows * kDim + i + 1];
    }
    const int64_t q_row = params.qo_rows[unit.leader + rows.group_of(row)];
    const int64_t qo_head = kv_head * rows.heads_per_kv + rows.head_of(row);
    T* to = static_cast<T*>(params.out) + q_row * params.out_stride_row + qo_head * params.out_stride_head + i % kDim;
    *reinterpret_cast<uint32_t*>(to) = pack<T>(low * inverse, high * inverse);
    if (params.lse != nullptr && i % kDim == 0) {
      params.lse[q_row * params.num_qo_heads + qo_head] =
          sum == 0.0f ? negative_infinity() : maximum_of(unit, row) * kLn2 + log_accurate(sum);
    }
  }
}

template <int kDim>
FMD_DEVICE void write_part(const PersistentWorkspace& workspace, const DecodeUnit& unit, const UnitRows& rows,
                           const float* vectors, int64_t part) {
  using Shape = DecodeShape<kDim>;
  for (int i = thread_index(); i < kUnitRows * kDim; i += Shape::kThreads) {
    const int row = i / kDim;
    if (!rows.is_row(row)) break;
    if (sum_of(unit, row) == 0.0f) continue;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) total += vectors[w * kUnitRows * kDim + i];
    workspace.out[part * kUnitRows * kDim + i] = total;
  }
  const int row = thread_index();
  if (row < kUnitRows && rows.is_row(row)) {
    workspace.maximum[part * kUnitRows + row] = maximum_of(unit, row);
    workspace.sum[part * kUnitRows + row] = sum_of(unit, row);
  }
}

template <int kDim>
int persistent_shared_bytes(int64_t num_groups) {
  const int64_t after_ring = sizeof(DecodeUnit) + (num_groups + 1) * sizeof(int64_t);
  return DecodeShape<kDim>::kRingBytes + static_cast<int>(after_ring);
}

template <typename T, int kDim>
FMD_KERNEL(DecodeShape<kDim>::kThreads, 1)
persistent_decode_kernel(const BranchedAttentionParams params, const PersistentWorkspace workspace,
                         const bool q_is_aligned) {
  using Shape = DecodeShape<kDim>;
  static_assert(sizeof(DecodeUnit) % sizeof(int64_t) == 0 && Shape::kThreads * sizeof(int64_t) <= Shape::kRingBytes);
  const int heads_per_kv = static_cast<int>(params.num_qo_heads / params.num_kv_heads);
  const int num_groups = static_cast<int>(params.num_groups);
  unsigned char* memory = shared_memory<unsigned char>();
  DecodeUnit& unit = *reinterpret_cast<DecodeUnit*>(memory + Shape::kRingBytes);
  int64_t* first = reinterpret_cast<int64_t*>(memory + Shape::kRingBytes + sizeof(DecodeUnit));
  allow_blocks_behind();
  scan_work<Shape>(params, heads_per_kv, workspace.fixed_split, first, reinterpret_cast<int64_t*>(memory));
  if (block_index() == 0) {
    for (int group = thread_index(); group <= num_groups; group += Shape::kThreads) {
      workspace.first[group] = first[group];
    }
  }
  const Places places(params, workspace, first[num_groups]);
  const bool fixed_split = workspace.fixed_split;
  int64_t place = block_index(), end = places.total;
  if (!fixed_split) {
    if (block_index() >= places.blocks) return;
    place = places.begin_of(block_index());
    end = places.begin_of(block_index() + 1);
  }
  while (place < end) {
    const int leader = leader_at(first, num_groups, places.columns, place);
    block_barrier();  // all have done with the unit before
    if (thread_index() == 0) fill_unit(params, leader, heads_per_kv, unit);
    block_barrier();
    // The unit's work, and where in it this block begins.
    const int64_t work = first[leader + 1] - first[leader];
    const int64_t offset = place - first[leader] * places.columns;
    const int64_t column = offset / work, begin = offset % work;
    const int num_tiles = (unit.num_keys + Shape::kKeys - 1) / Shape::kKeys;
    int tile_begin, tile_end;
    int64_t part;
    if (fixed_split) {
      tile_begin = static_cast<int>(num_tiles * begin / work);
      tile_end = static_cast<int>(num_tiles * (begin + 1) / work);
      part = places.fixed_part_of(leader, unit.num_groups, column) + begin;
      place += workspace.num_blocks;
    } else {
      tile_begin = static_cast<int>(begin);
      tile_end = static_cast<int>(work - begin < end - place ? work : begin + end - place);
      // A block has the end of at most one unit that it did not begin, and the beginning of at most one that it does
      // not end.
      part = 2 * block_index() + (tile_end < num_tiles ? 1 : 0);
      place += tile_end - tile_begin;
    }
    const int head_tile = static_cast<int>(column % workspace.num_head_tiles);
    const int64_t kv_head = column / workspace.num_head_tiles;
    const UnitRows rows{unit.num_groups, heads_per_kv, head_tile, workspace.num_head_tiles};
    decode_tiles<T, kDim>(params, unit, rows, kv_head, tile_begin, tile_end, memory, q_is_aligned);
    const float* vectors = reinterpret_cast<const float*>(memory);
    if (tile_begin == 0 && tile_end == num_tiles) {
      write_rows<T, kDim>(params, unit, rows, kv_head, vectors);
    } else {
      write_part<kDim>(workspace, unit, rows, vectors, part);
    }
  }
}

// A warp per group and query head: out = sum of out_i 2^(maximum_i - maximum) / sum of sum_i 2^(maximum_i - maximum),
// where several blocks had a part of it.
template <typename T, int kDim>
FMD_KERNEL(kCombineWarps* kWarpSize, 1)
persistent_combine_kernel(const BranchedAttentionParams params, const PersistentWorkspace workspace) {
  constexpr int kLaneDims = kDim / kWarpSize;
  using Vec = LaneDims<kLaneDims>;
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  const int64_t item = block_index() * kCombineWarps + warp;
  const bool is_item = item < params.num_groups * params.num_qo_heads;
  const int group = is_item ? static_cast<int>(item / params.num_qo_heads) : 0;
  const int qo_head = static_cast<int>(item % params.num_qo_heads);
  const int heads_per_kv = static_cast<int>(params.num_qo_heads / params.num_kv_heads);
  const int kv_head = qo_head / heads_per_kv, head = qo_head % heads_per_kv;
  int leader, num_groups;
  find_unit(params, group, heads_per_kv, &leader, &num_groups);
  wait_for_kernel_ahead();
  if (!is_item) return;

  const int head_tile = head / kUnitRows;
  const int row = head % kUnitRows + (group - leader) * heads_per_kv;
  const int64_t column = kv_head * workspace.num_head_tiles + head_tile;
  const Places places(params, workspace, workspace.first[params.num_groups]);
  const int64_t begin = workspace.first[leader], work = workspace.first[leader + 1] - begin;
  int64_t first_part = 0;
  int num_parts = 0;  // where there are no keys
  if (workspace.fixed_split) {
    num_parts = static_cast<int>(work);
    first_part = places.fixed_part_of(leader, num_groups, column);
  } else if (work > 0) {
    const int64_t place = begin * places.columns + column * work;
    const int64_t first_block = places.block_of(place);
    num_parts = static_cast<int>(places.block_of(place + work - 1) - first_block + 1);
    first_part = 2 * first_block + 1;
  }
  if (num_parts == 1) return;  // its block has written the result
  // Of an equal split: 2 * block + 1 but for the last block, which has the unit's end.
  const auto partial_of = [&](int part) {
    const int64_t at = workspace.fixed_split ? first_part + part : first_part + 2 * part - (part + 1 == num_parts);
    return at * kUnitRows + row;
  };

  float maximum = negative_infinity();
  for (int part = lane; part < num_parts; part += kWarpSize) {
    maximum = fmaxf(maximum, workspace.maximum[partial_of(part)]);
  }
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) maximum = fmaxf(maximum, shuffle_xor(maximum, mask));

  // A weight per lane and part, then all lanes over the vectors of these parts.
  float* weights = shared_memory<float>() + warp * kWarpSize;
  const Vec* vectors = reinterpret_cast<const Vec*>(workspace.out) + lane;
  float sum = 0.0f, out[kLaneDims] = {};
  for (int first = 0; first < num_parts; first += kWarpSize) {
    const int last = (num_parts < first + kWarpSize ? num_parts : first + kWarpSize) - 1;
    float weight = 0.0f;
    if (first + lane <= last) {
      const int64_t partial = partial_of(first + lane);
      const float own_sum = workspace.sum[partial];
      if (own_sum != 0.0f) weight = exp2_fast(workspace.maximum[partial] - maximum);
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

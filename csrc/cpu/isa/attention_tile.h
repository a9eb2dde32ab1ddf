// Attention of a panel of query rows over a tile of keys, with online softmax. Prefill and decode are made of it.
//
// The lanes of a vector are query rows. Scores come out as [keys, rows], so the softmax over keys works on whole
// vectors without a horizontal step; K and V are read as they lie, one broadcast element at a time; and the
// probabilities are already in the layout that the second product wants. A lane's result does not depend on what the
// other lanes hold, nor on how many there are: keys are added in order, one by one.
#pragma once

#include "cpu/isa/simd.h"
#include "cpu/kernels.h"

namespace fmd::cpu::FMD_ISA {

// Register tiles, sized so that accumulators, operands and a broadcast fit the register file.
constexpr int kPanelVectors = 2;
constexpr int kPanelRows = kPanelVectors * kLanes;
constexpr int kKeyStrip = kNumRegisters == 32 ? 12 : 6;  // keys per register tile of scores
constexpr int kDimStrip = kNumRegisters == 32 ? 12 : 4;  // elements of head_dim per register tile of values
constexpr int kTileKeys = 96;                            // a multiple of kKeyStrip

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
// The maximum before the first key. Finite, so that the difference of two of them is 0 and not NaN.
constexpr float kNoMaximum = -1e30f;

// kHeadDim == 0: head_dim is only known at run time.
template <int kHeadDim>
FMD_INLINE int64_t dim_of(int64_t head_dim) {
  return kHeadDim != 0 ? kHeadDim : head_dim;
}

// The state of a panel of up to kVectors * kLanes query rows. All arrays are fp32, the row is the last index.
struct Panel {
  float* q;            // [head_dim, rows], times softmax_scale * log2(e)
  float* out;          // [head_dim, rows], not yet divided by denominator
  float* maximum;      // [rows], in log2 units
  float* denominator;  // [rows]
};

constexpr int64_t panel_floats(int64_t head_dim) { return kPanelRows * (2 * head_dim + 2); }

FMD_INLINE Panel panel_at(float* memory, int64_t head_dim) {
  float* rest = memory + 2 * head_dim * kPanelRows;
  return {memory, memory + head_dim * kPanelRows, rest, rest + kPanelRows};
}

// scores[j, row] = k[j] . q[row] for j in [0, num_keys), in strips: reads k up to the next multiple of kKeyStrip.
template <int kHeadDim, int kVectors>
FMD_INLINE void compute_scores(const float* __restrict k, const float* __restrict q, float* __restrict scores,
                               int64_t num_keys, int64_t head_dim) {
  constexpr int kRows = kVectors * kLanes;
  const int64_t dim = dim_of<kHeadDim>(head_dim);
  for (int64_t begin = 0; begin < num_keys; begin += kKeyStrip) {
    const float* keys = k + begin * dim;
    VecF sum[kKeyStrip][kVectors] = {};
    for (int64_t d = 0; d < dim; ++d) {
      VecF query[kVectors];
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) query[n] = load<VecF>(q + d * kRows + n * kLanes);
#pragma GCC unroll 16
      for (int j = 0; j < kKeyStrip; ++j) {
        const VecF key = splat(keys[j * dim + d]);
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) sum[j][n] += key * query[n];
      }
    }
#pragma GCC unroll 16
    for (int j = 0; j < kKeyStrip; ++j) {
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) store(scores + (begin + j) * kRows + n * kLanes, sum[j][n]);
    }
  }
}

// scores -> 2^(scores - maximum), in place; updates maximum and denominator; rescale = 2^(old maximum - new maximum).
// kMasked: row r sees the first limits[r] keys only.
template <int kVectors, bool kMasked>
FMD_INLINE void online_softmax(float* __restrict scores, int64_t num_keys, const int32_t* limits, const Panel& panel,
                               VecF (&rescale)[kVectors]) {
  constexpr int kRows = kVectors * kLanes;
#pragma GCC unroll 4
  for (int n = 0; n < kVectors; ++n) {
    const int at = n * kLanes;
    const VecF old_maximum = load<VecF>(panel.maximum + at);
    const VecI limit = kMasked ? load<VecI>(limits + at) : VecI{};
    VecF maximum = old_maximum;
    for (int64_t j = 0; j < num_keys; ++j) {
      const VecF score = load<VecF>(scores + j * kRows + at);
      const VecF larger = max(maximum, score);
      maximum = kMasked ? (limit > static_cast<int32_t>(j) ? larger : maximum) : larger;
    }
    rescale[n] = exp2_nonpositive(old_maximum - maximum);
    VecF sum = {};
    for (int64_t j = 0; j < num_keys; ++j) {
      VecF weight = exp2_nonpositive(load<VecF>(scores + j * kRows + at) - maximum);
      if (kMasked) weight = limit > static_cast<int32_t>(j) ? weight : VecF{};
      sum += weight;
      store(scores + j * kRows + at, weight);
    }
    store(panel.maximum + at, maximum);
    store(panel.denominator + at, load<VecF>(panel.denominator + at) * rescale[n] + sum);
  }
}

// out[d, row] = out[d, row] * rescale[row] + sum over j of weights[j, row] * v[j, d], for kDims values of d. v and out
// point to the first of them.
template <int kDims, int kVectors>
FMD_INLINE void accumulate_dims(const float* __restrict v, const float* __restrict weights, float* __restrict out,
                                int64_t num_keys, int64_t head_dim, const VecF (&rescale)[kVectors]) {
  constexpr int kRows = kVectors * kLanes;
  VecF sum[kDims][kVectors] = {};
  for (int64_t j = 0; j < num_keys; ++j) {
    VecF weight[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) weight[n] = load<VecF>(weights + j * kRows + n * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kDims; ++i) {
      const VecF value = splat(v[j * head_dim + i]);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) sum[i][n] += value * weight[n];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kDims; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      float* at = out + i * kRows + n * kLanes;
      // A sum of tile sums: its rounding error grows with the number of tiles, not of keys.
      store(at, load<VecF>(at) * rescale[n] + sum[i][n]);
    }
  }
}

// The same for all of head_dim.
template <int kHeadDim, int kVectors>
FMD_INLINE void accumulate_values(const float* __restrict v, const float* __restrict weights, float* __restrict out,
                                  int64_t num_keys, int64_t head_dim, const VecF (&rescale)[kVectors]) {
  constexpr int kRows = kVectors * kLanes;
  const int64_t dim = dim_of<kHeadDim>(head_dim);
  int64_t d = 0;
  for (; d + kDimStrip <= dim; d += kDimStrip) {
    accumulate_dims<kDimStrip>(v + d, weights, out + d * kRows, num_keys, dim, rescale);
  }
  // head_dim is a multiple of 8.
  if (d + 8 <= dim && kDimStrip > 8) {
    accumulate_dims<8>(v + d, weights, out + d * kRows, num_keys, dim, rescale), d += 8;
  }
  if (d < dim) accumulate_dims<4>(v + d, weights, out + d * kRows, num_keys, dim, rescale);
}

// Adds num_keys keys to a panel. k and v: [kTileKeys, head_dim]. limits: null, or how many of these keys each row sees.
// scores: scratch, [kTileKeys, rows].
template <int kHeadDim, int kVectors>
__attribute__((noinline)) void attend(const float* k, const float* v, int64_t num_keys, const int32_t* limits,
                                      const Panel& panel, int64_t head_dim, float* scores) {
  VecF rescale[kVectors];
  compute_scores<kHeadDim, kVectors>(k, panel.q, scores, num_keys, head_dim);
  if (limits == nullptr) {
    online_softmax<kVectors, false>(scores, num_keys, limits, panel, rescale);
  } else {
    online_softmax<kVectors, true>(scores, num_keys, limits, panel, rescale);
  }
  accumulate_values<kHeadDim, kVectors>(v, scores, panel.out, num_keys, head_dim, rescale);
}

// K and V of up to kTileKeys keys as fp32 [keys, head_dim].
struct Tile {
  const float* k;
  const float* v;
};

constexpr int64_t tile_floats(int64_t head_dim) { return 2 * kTileKeys * head_dim; }

// Slots [slot_begin, slot_begin + count) of the pool.
struct SlotRun {
  int64_t slot_begin;
  int64_t count;
};

// The keys of two runs of one pool, for load_tile. padded: with readable memory up to the next multiple of kKeyStrip.
inline const float* tile_rows(const BranchedAttentionParams& params, const void* pool, int64_t stride_slot,
                              const SlotRun (&runs)[2], bool padded, float* memory) {
  const int64_t dim = params.head_dim;
  const bool in_one = runs[0].count == 0 || runs[1].count == 0;
  const int64_t num_keys = runs[0].count + runs[1].count;
  const int64_t end = (num_keys + kKeyStrip - 1) / kKeyStrip * kKeyStrip;
  // fp32 that lies as the kernels want it needs no copy.
  if (params.dtype == DType::kFloat32 && stride_slot == dim && in_one && (!padded || end == num_keys)) {
    return static_cast<const float*>(pool) + runs[runs[0].count == 0 ? 1 : 0].slot_begin * dim;
  }
  float* target = memory;
  for (const SlotRun& run : runs) {
    for (int64_t slot = run.slot_begin; slot < run.slot_begin + run.count; ++slot, target += dim) {
      widen(params.dtype, element(pool, params.dtype, slot * stride_slot), target, dim);
    }
  }
  // Scores of padding are not used, but subnormals left over there would be slow.
  if (padded) __builtin_memset(target, 0, (end - num_keys) * dim * sizeof(float));
  return memory;
}

// The keys of two runs one after the other, kTileKeys at most. memory: scratch of tile_floats(head_dim).
// Keys that fill up the last strip of scores are readable.
inline Tile load_tile(const BranchedAttentionParams& params, int64_t kv_head, const SlotRun (&runs)[2], float* memory) {
  const void* k = element(params.k, params.dtype, kv_head * params.k_stride_head);
  const void* v = element(params.v, params.dtype, kv_head * params.v_stride_head);
  return {tile_rows(params, k, params.k_stride_slot, runs, true, memory),
          tile_rows(params, v, params.v_stride_slot, runs, false, memory + kTileKeys * params.head_dim)};
}

// A query row of the call: row of q and out, and query head.
struct QueryRow {
  int64_t row;
  int64_t head;
};

// Fills a panel of kRows rows from num_rows query rows, the first of which is row_at(0). The rest is zero.
// buffer: scratch, [kPanelRows, head_dim].
template <int kRows, typename RowAt>
FMD_INLINE void load_queries(const BranchedAttentionParams& params, int64_t num_rows, RowAt row_at, const Panel& panel,
                             float* buffer) {
  const int64_t dim = params.head_dim;
  const float scale = params.softmax_scale * kLog2e;
  for (int64_t i = 0; i < num_rows; ++i) {
    const QueryRow at = row_at(i);
    widen(params.dtype, element(params.q, params.dtype, at.row * params.q_stride_row + at.head * params.q_stride_head),
          buffer + i * dim, dim);
  }
  __builtin_memset(buffer + num_rows * dim, 0, (kRows - num_rows) * dim * sizeof(float));
  for (int64_t i = 0; i < kRows * dim; ++i) buffer[i] *= scale;
  transpose(buffer, dim, kRows, dim, panel.q, kRows);
  __builtin_memset(panel.out, 0, kRows * dim * sizeof(float));
  for (int64_t i = 0; i < kRows; ++i) {
    panel.maximum[i] = kNoMaximum;
    panel.denominator[i] = 0.0f;
  }
}

FMD_INLINE float natural_lse(float maximum, float denominator) {
  return denominator == 0.0f ? -__builtin_inff() : maximum * kLn2 + __builtin_logf(denominator);
}

}  // namespace fmd::cpu::FMD_ISA

// The two steps of branched_decode: attention over one chunk of keys, and the combine of chunks by their lse.
#pragma once

#include "cpu/isa/attention_tile.h"

namespace fmd::cpu::FMD_ISA {

template <int kHeadDim, int kVectors>
void decode_chunk_panels(const BranchedAttentionParams& params, const DecodeChunk& chunk,
                         const DecodePartials& partials) {
  constexpr int kRows = kVectors * kLanes;
  const int64_t dim = dim_of<kHeadDim>(params.head_dim);
  const int64_t heads_per_kv = params.num_qo_heads / params.num_kv_heads;
  const int64_t num_rows = (chunk.group_end - chunk.group_begin) * heads_per_kv;
  const int64_t num_panels = (num_rows + kRows - 1) / kRows;

  float* memory = thread_scratch(ScratchUse::kWorker,
                                 num_panels * panel_floats(dim) + tile_floats(dim) + (kTileKeys + dim) * kPanelRows);
  const auto panel = [&](int64_t i) { return panel_at(memory + i * panel_floats(dim), dim); };
  float* tile_memory = memory + num_panels * panel_floats(dim);
  float* scores = tile_memory + tile_floats(dim);
  float* buffer = scores + kTileKeys * kPanelRows;

  for (int64_t i = 0; i < num_panels; ++i) {
    const int64_t begin = i * kRows;
    const auto row = [&](int64_t r) {
      return QueryRow{params.qo_rows[chunk.group_begin + (begin + r) / heads_per_kv],
                      chunk.kv_head * heads_per_kv + (begin + r) % heads_per_kv};
    };
    load_queries<kRows>(params, min(kRows, num_rows - begin), row, panel(i), buffer);
  }
  for (int64_t tile_begin = 0; tile_begin < chunk.num_keys; tile_begin += kTileKeys) {
    const int64_t tile_keys = min(kTileKeys, chunk.num_keys - tile_begin);
    const SlotRun runs[2] = {{chunk.slot_begin + tile_begin, tile_keys}, {0, 0}};
    const Tile tile = load_tile(params, chunk.kv_head, runs, tile_memory);
    for (int64_t i = 0; i < num_panels; ++i) {
      attend<kHeadDim, kVectors>(tile.k, tile.v, tile_keys, nullptr, panel(i), dim, scores);
    }
  }
  for (int64_t i = 0; i < num_panels; ++i) {
    const int64_t row = chunk.partial_row + i * kRows;
    const int64_t count = min(kRows, num_rows - i * kRows);
    transpose(panel(i).out, kRows, dim, count, partials.out + row * dim, dim);
    __builtin_memcpy(partials.maximum + row, panel(i).maximum, count * sizeof(float));
    __builtin_memcpy(partials.denominator + row, panel(i).denominator, count * sizeof(float));
  }
}

template <int kHeadDim>
void decode_chunk(const BranchedAttentionParams& params, const DecodeChunk& chunk, const DecodePartials& partials) {
  const int64_t heads_per_kv = params.num_qo_heads / params.num_kv_heads;
  if ((chunk.group_end - chunk.group_begin) * heads_per_kv <= kLanes) {
    decode_chunk_panels<kHeadDim, 1>(params, chunk, partials);
  } else {
    decode_chunk_panels<kHeadDim, kPanelVectors>(params, chunk, partials);
  }
}

inline void decode_chunk_any(const BranchedAttentionParams& params, const DecodeChunk& chunk,
                             const DecodePartials& partials) {
  switch (params.head_dim) {
    case 64:
      return decode_chunk<64>(params, chunk, partials);
    case 128:
      return decode_chunk<128>(params, chunk, partials);
    default:
      return decode_chunk<0>(params, chunk, partials);
  }
}

// out = sum of out_i * 2^(maximum_i - maximum) / sum of denominator_i * 2^(maximum_i - maximum), for the heads of a
// group.
inline void decode_combine(const BranchedAttentionParams& params, const DecodeCombine& combine,
                           const DecodePartials& partials) {
  const int64_t dim = params.head_dim;
  const int64_t heads_per_kv = params.num_qo_heads / params.num_kv_heads;
  const int64_t row = params.qo_rows[combine.group];
  float* total = thread_scratch(ScratchUse::kWorker, dim);
  for (int64_t h = 0; h < heads_per_kv; ++h) {
    float maximum = kNoMaximum;
    for (int64_t i = 0; i < combine.num_chunks; ++i) {
      const float candidate = partials.maximum[combine.first_row[i] + h];
      maximum = candidate > maximum ? candidate : maximum;
    }
    float denominator = 0.0f;
    __builtin_memset(total, 0, dim * sizeof(float));
    for (int64_t i = 0; i < combine.num_chunks; ++i) {
      const int64_t partial = combine.first_row[i] + h;
      const float rescale = exp2_nonpositive(splat(partials.maximum[partial] - maximum))[0];
      denominator += partials.denominator[partial] * rescale;
      const float* out = partials.out + partial * dim;
      for (int64_t d = 0; d < dim; ++d) total[d] += out[d] * rescale;
    }
    const float inverse = denominator == 0.0f ? 0.0f : 1.0f / denominator;
    for (int64_t d = 0; d < dim; ++d) total[d] *= inverse;
    const int64_t head = combine.kv_head * heads_per_kv + h;
    narrow(params.dtype, total,
           element(params.out, params.dtype, row * params.out_stride_row + head * params.out_stride_head), dim);
    if (params.lse != nullptr) params.lse[row * params.num_qo_heads + head] = natural_lse(maximum, denominator);
  }
}

}  // namespace fmd::cpu::FMD_ISA

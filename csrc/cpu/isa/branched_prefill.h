// One block of query rows of branched_prefill: the heads of a GQA group side by side, over all keys they see.
#pragma once

#include "cpu/isa/attention_tile.h"

namespace fmd::cpu::FMD_ISA {

// Divides a panel by its denominators and writes num_rows rows to out, and their lse.
template <int kRows, typename RowAt>
FMD_INLINE void store_panel(const BranchedAttentionParams& params, int64_t num_rows, RowAt row_at, const Panel& panel,
                            float* buffer) {
  const int64_t dim = params.head_dim;
  VecF inverse[kRows / kLanes];
  for (int n = 0; n < kRows / kLanes; ++n) {
    const VecF denominator = load<VecF>(panel.denominator + n * kLanes);
    inverse[n] = denominator == 0.0f ? VecF{} : 1.0f / denominator;
  }
  for (int64_t d = 0; d < dim; ++d) {
    for (int n = 0; n < kRows / kLanes; ++n) {
      float* at = panel.out + d * kRows + n * kLanes;
      store(at, load<VecF>(at) * inverse[n]);
    }
  }
  transpose(panel.out, kRows, dim, kRows, buffer, dim);
  for (int64_t i = 0; i < num_rows; ++i) {
    const QueryRow at = row_at(i);
    narrow(params.dtype, buffer + i * dim,
           element(params.out, params.dtype, at.row * params.out_stride_row + at.head * params.out_stride_head), dim);
    if (params.lse != nullptr) {
      params.lse[at.row * params.num_qo_heads + at.head] = natural_lse(panel.maximum[i], panel.denominator[i]);
    }
  }
}

template <int kHeadDim>
void prefill_block(const BranchedAttentionParams& params, const PrefillBlock& block) {
  const int64_t dim = dim_of<kHeadDim>(params.head_dim);
  const int64_t heads_per_kv = params.num_qo_heads / params.num_kv_heads;
  const int64_t first_row = params.cu_seqlens_q[block.group];
  const int64_t qo_len = params.cu_seqlens_q[block.group + 1] - first_row;
  const KeyRanges ranges = params.key_ranges[block.group];
  const int64_t num_rows = block.num_queries * heads_per_kv;
  const int64_t num_panels = (num_rows + kPanelRows - 1) / kPanelRows;

  const auto row_at = [&](int64_t i) {  // rows of the block: query by query, the heads of the group inside
    return QueryRow{params.qo_rows[first_row + block.query_begin + i / heads_per_kv],
                    block.kv_head * heads_per_kv + i % heads_per_kv};
  };
  const auto visible_keys = [&](int64_t i) {
    const int64_t query = block.query_begin + min(i, num_rows - 1) / heads_per_kv;
    return ranges.prefix_len + max(0, ranges.kv_len - qo_len + query + 1);
  };

  float* memory = thread_scratch(ScratchUse::kWorker,
                                 num_panels * panel_floats(dim) + tile_floats(dim) + (kTileKeys + dim) * kPanelRows);
  const auto panel = [&](int64_t i) { return panel_at(memory + i * panel_floats(dim), dim); };
  float* tile_memory = memory + num_panels * panel_floats(dim);
  float* scores = tile_memory + tile_floats(dim);
  float* buffer = scores + kTileKeys * kPanelRows;

  // A last panel with few rows is half as wide.
  const auto is_narrow = [&](int64_t i) { return num_rows - i * kPanelRows <= kLanes; };
  for (int64_t i = 0; i < num_panels; ++i) {
    const int64_t begin = i * kPanelRows;
    const int64_t count = min(kPanelRows, num_rows - begin);
    const auto row = [&](int64_t r) { return row_at(begin + r); };
    if (is_narrow(i)) {
      load_queries<kLanes>(params, count, row, panel(i), buffer);
    } else {
      load_queries<kPanelRows>(params, count, row, panel(i), buffer);
    }
  }

  const int64_t num_keys = visible_keys(num_rows - 1);
  for (int64_t tile_begin = 0; tile_begin < num_keys; tile_begin += kTileKeys) {
    const int64_t tile_keys = min(kTileKeys, num_keys - tile_begin);
    // Keys in order: the prefix segment, then the group's own.
    const int64_t from_prefix = max(0, min(tile_keys, ranges.prefix_len - tile_begin));
    const SlotRun runs[2] = {{ranges.prefix_start + tile_begin, from_prefix},
                             {ranges.kv_start + tile_begin + from_prefix - ranges.prefix_len, tile_keys - from_prefix}};
    const Tile tile = load_tile(params, block.kv_head, runs, tile_memory);

    for (int64_t i = 0; i < num_panels; ++i) {
      const int64_t begin = i * kPanelRows;
      const int64_t visible = min(tile_keys, visible_keys(begin + kPanelRows - 1) - tile_begin);
      if (visible <= 0) continue;
      int32_t limits[kPanelRows];
      const bool masked = visible_keys(begin) - tile_begin < visible;
      if (masked) {
        for (int r = 0; r < kPanelRows; ++r) {
          limits[r] = static_cast<int32_t>(max(0, min(visible, visible_keys(begin + r) - tile_begin)));
        }
      }
      if (is_narrow(i)) {
        attend<kHeadDim, 1>(tile.k, tile.v, visible, masked ? limits : nullptr, panel(i), dim, scores);
      } else {
        attend<kHeadDim, kPanelVectors>(tile.k, tile.v, visible, masked ? limits : nullptr, panel(i), dim, scores);
      }
    }
  }

  for (int64_t i = 0; i < num_panels; ++i) {
    const int64_t begin = i * kPanelRows;
    const int64_t count = min(kPanelRows, num_rows - begin);
    const auto row = [&](int64_t r) { return row_at(begin + r); };
    if (is_narrow(i)) {
      store_panel<kLanes>(params, count, row, panel(i), buffer);
    } else {
      store_panel<kPanelRows>(params, count, row, panel(i), buffer);
    }
  }
}

inline void prefill_block_any(const BranchedAttentionParams& params, const PrefillBlock& block) {
  switch (params.head_dim) {
    case 64:
      return prefill_block<64>(params, block);
    case 128:
      return prefill_block<128>(params, block);
    default:
      return prefill_block<0>(params, block);
  }
}

}  // namespace fmd::cpu::FMD_ISA

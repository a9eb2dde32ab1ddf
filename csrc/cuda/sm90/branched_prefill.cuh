// Attention of query groups to a prefix and, causally, to their own segment: sm_90a, on warpgroup matrix products.
//
// An item is 128 rows (see prefill_block.cuh). There are as many blocks as run at once; each takes items one after the
// other from a queue, those with most keys first. Its first warpgroup, the producer, takes the items and brings their
// tiles of K and V, in turns, into a ring of kSlots slots; each of two consumer warpgroups computes 64 of an item's
// rows. The producer is already at the next item while the consumers end one.
//
// An mbarrier per slot says when it is full and one when it is empty. The copies themselves arrive when they are there,
// so the producer never waits for them, only for empty slots; the consumers fence after their wait. A consumer issues
// the scores of a tile and the values of the tile before it together, so that its softmax runs beside its values. The
// consumers issue in turns, so that one's softmax also runs beside the other's products: otherwise both may come to it
// at once.
//
// The producer copies 16 bytes at a time: segments begin at any slot, a tile may hold the end of the prefix and the
// beginning of the own segment, and what lies beyond must not be read, since it may be NaN. Boxes of a tensor map can
// do none of that.
//
// Tiles are panels of 64 dims, that is of 128-byte rows, whose 16-byte vectors are swizzled as wgmma expects it.
#pragma once

#include "cuda/attention_tile.cuh"
#include "cuda/device/grid.h"
#include "cuda/device/sm90.h"
#include "cuda/prefill_block.cuh"
#include "fmd/branched_attention.h"

namespace fmd::cuda {

template <int kDim>
struct Sm90PrefillShape {
  static constexpr int kConsumers = 2;  // which take turns
  static constexpr int kThreads = (1 + kConsumers) * kWarpgroupSize;
  static constexpr int kGroupRows = 64;
  static constexpr int kRows = kConsumers * kGroupRows;
  static constexpr int kKeys = 128;
  static constexpr int kSlots = 4;
  static constexpr int kGroupElements = kGroupRows * kDim;  // of q
  static constexpr int kSlotElements = kKeys * kDim;
  static constexpr int kTileBytes = (kConsumers * kGroupElements + kSlots * kSlotElements) * 2;
  // Registers per thread: what the consumers need, out of those that every thread begins with. More in all, and the
  // consumers would wait for them for ever.
  static constexpr int kStartRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * kStartRegisters);

  // Halves of tiles are numbered through all items of a block: K of the first tile, V of it, K of the second, ...; half
  // h lies in slot h % kSlots.
  static constexpr int kItems = 2;  // that a block has at once
  struct Control {
    PrefillBlock items[kItems];  // one without rows: there are no more
    uint64_t full[kSlots], empty[kSlots], item_full[kItems], item_empty[kItems];
  };
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kSharedBytes = kTileBytes + static_cast<int>(sizeof(Control));

  // Named barriers: 1 and 2 are each consumer's own, 3 and 4 their turns. A consumer waits for its turn where it issues
  // the products of a tile, and gives the turn to the other behind them. The first consumer has the first turn; it
  // takes the one that is left in the end.
  FMD_DEVICE static void take_turn(int consumer) { group_barrier(3 + consumer, kConsumers * kWarpgroupSize); }
  FMD_DEVICE static void give_turn(int consumer) { group_barrier_arrive(4 - consumer, kConsumers * kWarpgroupSize); }

  FMD_DEVICE static int num_tiles(const PrefillBlock& block) { return (block.num_keys + kKeys - 1) / kKeys; }
};

// Block b has item b first; later ones are those from num_blocks on, in the order in which blocks ask.
struct PrefillQueue {
  int* taken;  // 0 before the launch
  int num_blocks, num_items, num_row_blocks;
};

// As one thread takes it.
struct ItemOfQueue {
  int number;

  FMD_DEVICE int64_t index() const { return number; }
  FMD_DEVICE bool fills() const { return true; }
};

// Place of the 16-byte vector `vec` of a row in a tile [kRows, dims] of panels.
template <int kRows>
FMD_DEVICE int panel_place(int row, int vec) {
  return vec / 8 * kRows * kPanelDims + swizzled<kPanelDims>(row, vec % 8);
}

// The products of a consumer. Addresses are those of tiles; fragments are those of RowState with one row tile.
template <typename T, int kDim>
struct Sm90Products {
  using Shape = Sm90PrefillShape<kDim>;
  using State = RowState<T, kDim, 1, Shape::kKeys>;
  using Weights = uint32_t[Shape::kKeys / 16][4];

  using Sums = float[Shape::kKeys / 2];  // Scores, as wgmma sees them
  using Out = float[kDim / 2];

  // scores = q k^T, in the background.
  FMD_DEVICE static void score(typename State::Scores& scores, SharedAddress q, SharedAddress k) {
    auto& d = reinterpret_cast<float (&)[Shape::kKeys / 2]>(scores);
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      const int panel = step / 4, within = step % 4 * 32;
      wgmma_shared<T, Shape::kKeys>(d, matrix_descriptor(q + panel * Shape::kGroupRows * 128 + within, 0, kAtomBytes),
                                    matrix_descriptor(k + panel * Shape::kKeys * 128 + within, 0, kAtomBytes),
                                    step > 0);
    }
    wgmma_commit();
  }

  // out += weights v, in the background.
  FMD_DEVICE static void accumulate(State& state, const Weights& weights, SharedAddress v) {
    auto& d = reinterpret_cast<float (&)[kDim / 2]>(state.out);
#pragma unroll
    for (int step = 0; step < Shape::kKeys / 16; ++step) {
      wgmma_registers<T, kDim>(d, weights[step],
                               matrix_descriptor(v + step * 2 * kAtomBytes, Shape::kKeys * 128, kAtomBytes));
    }
    wgmma_commit();
  }
};

template <typename T, int kDim>
FMD_DEVICE void sm90_prefill_produce(const BranchedAttentionParams& params, const PrefillQueue& queue, T* ring,
                                     typename Sm90PrefillShape<kDim>::Control& control) {
  using Shape = Sm90PrefillShape<kDim>;
  constexpr int kRowVecs = kDim / kVecElements;
  constexpr int kPassRows = kWarpgroupSize / kRowVecs;  // rows that the warpgroup copies at once
  const int thread = thread_index() % kWarpgroupSize;
  const int vec = thread % kRowVecs;

  const auto copy_half = [&](const PrefillBlock& block, int tile_half, int half) {
    const bool is_v = tile_half % 2 != 0;
    const T* pool = static_cast<const T*>(is_v ? params.v : params.k);
    const int64_t stride_slot = is_v ? params.v_stride_slot : params.k_stride_slot;
    const T* from = pool + block.kv_head * (is_v ? params.v_stride_head : params.k_stride_head) + vec * kVecElements;
    T* tile = ring + half % Shape::kSlots * Shape::kSlotElements;
    const int prefix_len = block.prefix_len, num_keys = block.num_keys;
#pragma unroll 4
    for (int row = thread / kRowVecs; row < Shape::kKeys; row += kPassRows) {
      const int key = tile_half / 2 * Shape::kKeys + row;
      const bool valid = key < num_keys;
      const int64_t slot = key + (key < prefix_len ? block.prefix_slot : block.own_slot);
      copy_async_16(tile + panel_place<Shape::kKeys>(row, vec), valid ? from + slot * stride_slot : pool, valid);
    }
    copy_async_arrive(&control.full[half % Shape::kSlots]);
  };
  // By one thread.
  int next = static_cast<int>(block_index());
  const auto take_item = [&](PrefillBlock& block) {
    const auto starts = [&] {
      return start_prefill_block<Shape::kRows>(params, queue.num_row_blocks, ItemOfQueue{next}, block);
    };
    while (next < queue.num_items && !starts()) next = queue.num_blocks + take_number(queue.taken);
    if (next >= queue.num_items) {
      block.num_rows = 0;
    } else {
      next = queue.num_blocks + take_number(queue.taken);
    }
  };

  int half = 0;
  for (int turn = 0;; ++turn) {
    const int at = turn % Shape::kItems;
    PrefillBlock& block = control.items[at];
    if (thread < kWarpSize) {
      // The first round finds all slots empty: of the phase before the first, a wait is over at once.
      mbarrier_wait(&control.item_empty[at], (turn / Shape::kItems + 1) % 2);
      if (thread == 0) {
        take_item(block);
        mbarrier_arrive(&control.item_full[at]);
      }
    }
    mbarrier_wait(&control.item_full[at], turn / Shape::kItems % 2);
    if (block.num_rows == 0) break;
    const int num_halves = 2 * Shape::num_tiles(block);
    for (int tile_half = 0; tile_half < num_halves; ++tile_half, ++half) {
      mbarrier_wait(&control.empty[half % Shape::kSlots], (half / Shape::kSlots + 1) % 2);
      copy_half(block, tile_half, half);
    }
    warp_barrier();
    if (thread % kWarpSize == 0) mbarrier_arrive(&control.item_empty[at]);
  }
  // No thread leaves before its copies.
  copy_async_commit();
  copy_async_wait<0>();
}

template <typename T, int kDim>
FMD_DEVICE void sm90_prefill_consume_item(const BranchedAttentionParams& params, const PrefillBlock& block, T* q_tile,
                                          const T* ring, typename Sm90PrefillShape<kDim>::Control& control,
                                          int first_half, bool q_is_aligned) {
  using Shape = Sm90PrefillShape<kDim>;
  using Products = Sm90Products<T, kDim>;
  using State = typename Products::State;
  constexpr int kRowVecs = kDim / kVecElements;
  const int consumer = thread_index() / kWarpgroupSize - 1;
  const int thread = thread_index() % kWarpgroupSize;
  const int warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int first_row = consumer * Shape::kGroupRows;
  const int num_tiles = Shape::num_tiles(block);

  for (int row = thread / kRowVecs; row < Shape::kGroupRows; row += kWarpgroupSize / kRowVecs) {
    const int vec = thread % kRowVecs;
    T* to = q_tile + panel_place<Shape::kGroupRows>(row, vec);
    const bool valid = first_row + row < block.num_rows;
    const T* from = static_cast<const T*>(params.q);
    if (valid) {
      from += block.offset_of(first_row + row, params.qo_rows, params.q_stride_row, params.q_stride_head) +
              vec * kVecElements;
    }
    if (q_is_aligned || !valid) {
      copy_async_16(to, from, valid);
    } else {
      for (int i = 0; i < kVecElements; ++i) to[i] = from[i];
    }
  }
  copy_async_commit();
  copy_async_wait<0>();
  async_proxy_fence();
  group_barrier(1 + consumer, kWarpgroupSize);

  const SharedAddress q = shared_address(q_tile);
  const auto slot_of = [&](int half) { return shared_address(ring + half % Shape::kSlots * Shape::kSlotElements); };
  const auto wait_for = [&](int half) { mbarrier_wait(&control.full[half % Shape::kSlots], half / Shape::kSlots % 2); };
  const auto release = [&](int half) {
    if (lane == 0) mbarrier_arrive(&control.empty[half % Shape::kSlots]);
  };
  const Scale scale = score_scale(params.softmax_scale);
  const int first_masked_tile = block.limit_of(first_row) / Shape::kKeys;
  // This lane's rows of the block: this one, and the one eight below.
  const int lane_row = first_row + warp * 16 + lane / 4;

  State state;
  state.start();
  typename State::Scores scores;
  float factors[2];
  typename Products::Weights weights;
  const auto softmax = [&](int tile) {
    if (scale.q_sign != 0) {
#pragma unroll
      for (int i = 0; i < Shape::kKeys / 2; ++i) scores[0][i / 4][i % 4] = -scores[0][i / 4][i % 4];
    }
    if (tile >= first_masked_tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int limit = block.limit_of(lane_row + half * 8) - tile * Shape::kKeys - lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < Shape::kKeys / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (n * 8 + i >= limit) scores[0][n][2 * half + i] = negative_infinity();
          }
        }
      }
    }
    state.online_softmax(scores, scale.log2, [&](int, int half, float factor) { factors[half] = factor; });
  };
  const auto pack_weights = [&] {
#pragma unroll
    for (int step = 0; step < Shape::kKeys / 16; ++step) State::fragment_of(weights[step], scores[0], step);
  };

  const auto fence_scores = [&] { wgmma_fence_operand(reinterpret_cast<typename Products::Sums&>(scores)); };
  const auto fence_out = [&] { wgmma_fence_operand(reinterpret_cast<typename Products::Out&>(state.out)); };
  // Before products that take what the softmax made.
  const auto fence_operands = [&] {
#pragma unroll
    for (int step = 0; step < Shape::kKeys / 16; ++step) wgmma_fence_operand(weights[step]);
    fence_out();
    wgmma_fence();
  };

  if (num_tiles > 0) {
    wait_for(first_half);
    async_proxy_fence();
    Shape::take_turn(consumer);
    wgmma_fence();
    Products::score(scores, q, slot_of(first_half));
    Shape::give_turn(consumer);
    wgmma_wait<0>();
    fence_scores();
    release(first_half);
    softmax(0);
    pack_weights();
  }
  for (int tile = 1; tile < num_tiles; ++tile) {
    const int k_half = first_half + 2 * tile, v_half = k_half - 1;
    wait_for(v_half);
    wait_for(k_half);
    async_proxy_fence();
    Shape::take_turn(consumer);
    fence_operands();
    Products::score(scores, q, slot_of(k_half));
    Products::accumulate(state, weights, slot_of(v_half));
    Shape::give_turn(consumer);
    wgmma_wait<1>();
    fence_scores();
    release(k_half);
    softmax(tile);
    wgmma_wait<0>();
    fence_out();
    release(v_half);
#pragma unroll
    for (int half = 0; half < 2; ++half) state.rescale(0, half, factors[half]);
    pack_weights();
  }
  if (num_tiles > 0) {
    const int v_half = first_half + 2 * num_tiles - 1;
    wait_for(v_half);
    async_proxy_fence();
    fence_operands();
    Products::accumulate(state, weights, slot_of(v_half));
    wgmma_wait<0>();
    fence_out();
    release(v_half);
  }
  state.finish();

  // Through shared memory, so that rows leave in whole vectors: in place of q, once the whole warpgroup has done with
  // it.
  group_barrier(1 + consumer, kWarpgroupSize);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float inverse = state.inverse_sum(0, half);
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      T* to = q_tile + panel_place<Shape::kGroupRows>(warp * 16 + half * 8 + lane / 4, d) + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(to) =
          pack<T>(state.out[0][d][2 * half] * inverse, state.out[0][d][2 * half + 1] * inverse);
    }
    const int row = lane_row + half * 8;
    if (params.lse != nullptr && lane % 4 == 0 && row < block.num_rows) {
      params.lse[block.offset_of(row, params.qo_rows, params.num_qo_heads, 1)] = state.lse(0, half, scale.log2);
    }
  }
  warp_barrier();
  for (int row = warp * 16 + lane / kRowVecs; row < warp * 16 + 16; row += kWarpSize / kRowVecs) {
    if (first_row + row >= block.num_rows) break;
    const int vec = lane % kRowVecs;
    T* to = static_cast<T*>(params.out) +
            block.offset_of(first_row + row, params.qo_rows, params.out_stride_row, params.out_stride_head);
    *reinterpret_cast<Vec16*>(to + vec * kVecElements) =
        *reinterpret_cast<const Vec16*>(q_tile + panel_place<Shape::kGroupRows>(row, vec));
  }
}

template <typename T, int kDim>
FMD_DEVICE void sm90_prefill_consume(const BranchedAttentionParams& params, T* q_tile, const T* ring,
                                     typename Sm90PrefillShape<kDim>::Control& control, bool q_is_aligned) {
  using Shape = Sm90PrefillShape<kDim>;
  const int consumer = thread_index() / kWarpgroupSize - 1;
  q_tile += consumer * Shape::kGroupElements;
  if (consumer == 1) Shape::give_turn(consumer);
  int first_half = 0;
  for (int turn = 0;; ++turn) {
    const int at = turn % Shape::kItems;
    const PrefillBlock& block = control.items[at];
    mbarrier_wait(&control.item_full[at], turn / Shape::kItems % 2);
    if (block.num_rows == 0) break;
    sm90_prefill_consume_item<T, kDim>(params, block, q_tile, ring, control, first_half, q_is_aligned);
    first_half += 2 * Shape::num_tiles(block);
    group_barrier(1 + consumer, kWarpgroupSize);  // all have done with q_tile
    if (thread_index() % kWarpSize == 0) mbarrier_arrive(&control.item_empty[at]);
  }
  if (consumer == 0) Shape::take_turn(consumer);
}

template <typename T, int kDim>
FMD_KERNEL(Sm90PrefillShape<kDim>::kThreads, 1)
sm90_branched_prefill_kernel(const BranchedAttentionParams params, const PrefillQueue queue, const bool q_is_aligned) {
  using Shape = Sm90PrefillShape<kDim>;
  unsigned char* const memory = shared_memory<unsigned char>();
  auto& control = *reinterpret_cast<typename Shape::Control*>(memory + Shape::kTileBytes);
  T* const q_tile = reinterpret_cast<T*>(memory);
  T* const ring = q_tile + Shape::kConsumers * Shape::kGroupElements;
  if (thread_index() == 0) {
    for (int slot = 0; slot < Shape::kSlots; ++slot) {
      mbarrier_init(&control.full[slot], kWarpgroupSize);
      mbarrier_init(&control.empty[slot], Shape::kConsumers * kWarpgroupSize / kWarpSize);
    }
    for (int at = 0; at < Shape::kItems; ++at) {
      mbarrier_init(&control.item_full[at], 1);
      mbarrier_init(&control.item_empty[at], Shape::kWarps);
    }
  }
  block_barrier();
  if (thread_index() < kWarpgroupSize) {
    setmaxnreg_dec<Shape::kProducerRegisters>();
    sm90_prefill_produce<T, kDim>(params, queue, ring, control);
  } else {
    setmaxnreg_inc<Shape::kConsumerRegisters>();
    sm90_prefill_consume<T, kDim>(params, q_tile, ring, control, q_is_aligned);
  }
}

}  // namespace fmd::cuda

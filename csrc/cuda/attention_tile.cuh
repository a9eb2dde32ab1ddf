// What one warp does with a tile of keys, for prefill and decode: scores on tensor cores, online softmax, sum of
// values.
//
// Fragments of m16n8k16, lane l: of a 16x8 fp32 tile, elements (l / 4, 2 (l % 4) + {0, 1}) and the same eight rows
// below. "Two rows" in what follows are these: l / 4 and l / 4 + 8 of each 16.
#pragma once

#include <cmath>

#include "cuda/device/intrinsics.h"

namespace fmd::cuda {

constexpr int kVecElements = 8;  // 16-bit elements per 16-byte vector
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Place of the 16-byte vector `vec` of row `row` in a shared tile [rows, kDim]: in any column the vectors of eight
// successive rows lie in eight different bank groups.
template <int kDim>
FMD_DEVICE int swizzled(int row, int vec) {
  return row * kDim + (vec ^ (row & 7)) * kVecElements;
}

// From the address of vector 0 or 1 of a row in a swizzled tile (that begins at a multiple of 128 bytes) to the vector
// `vecs` further on, an even number. One operation from one register, where offsets kept for every vec would take many.
FMD_DEVICE SharedAddress vecs_on(SharedAddress address, int vecs) {
  return (address ^ static_cast<SharedAddress>(vecs % 8 * 16)) + vecs / 8 * 128;
}

// The factor of scores in base 2, never 0: then infinities stay what they are (a factor of 2^-126 makes all finite
// scores equal just as well). Negative scales are turned around with the sign of q.
struct Scale {
  float log2;
  uint32_t q_sign;  // XORed onto pairs of q
};
FMD_DEVICE Scale score_scale(float softmax_scale) {
  const float magnitude = softmax_scale < 0.0f ? -softmax_scale : softmax_scale;
  const float log2 = magnitude * kLog2E;
  return {log2 < 1.1754944e-38f ? 1.1754944e-38f : log2, softmax_scale < 0.0f ? 0x80008000u : 0u};
}

// Of the four lanes that share rows.
FMD_DEVICE float max_of_row(float value) {
  value = fmaxf(value, shuffle_xor(value, 1));
  return fmaxf(value, shuffle_xor(value, 2));
}
FMD_DEVICE float sum_of_row(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

// This lane's address for the A fragment [16 rows, 16 dims] of a swizzled tile at dim 0.
template <int kDim, typename T>
FMD_DEVICE SharedAddress rows_address(const T* tile) {
  const int lane = thread_index() % kWarpSize;
  return shared_address(tile + swizzled<kDim>(lane % 16, lane / 16));
}

// Running result of kRowTiles * 16 query rows of a warp.
template <typename T, int kDim, int kRowTiles, int kKeys>
struct RowState {
  using Scores = float[kRowTiles][kKeys / 8][4];

  float out[kRowTiles][kDim / 8][4];
  float maximum[kRowTiles][2];  // of unscaled scores
  float sum[kRowTiles][2];      // this lane's columns only, until finish()

  FMD_DEVICE void start() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[r][d][i] = 0.0f;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        maximum[r][half] = negative_infinity();
        sum[r][half] = 0.0f;
      }
    }
  }

  // scores = q k^T. q_fragment(fragment, row_tile, step) gives q; k_tile: swizzled [kKeys, kDim].
  template <typename LoadQ>
  FMD_DEVICE static void score(Scores& scores, const T* k_tile, LoadQ q_fragment) {
    const int lane = thread_index() % kWarpSize;
    const SharedAddress k_row = shared_address(k_tile + swizzled<kDim>(lane % 8 + lane / 16 * 8, lane / 8 % 2));
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[r][n][i] = 0.0f;
      }
    }
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t q[kRowTiles][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) q_fragment(q[r], r, step);
#pragma unroll
      for (int n = 0; n < kKeys / 8; n += 2) {
        uint32_t k[4];  // two B fragments: eight keys each
        load_matrices(k, vecs_on(k_row, step * 2) + n * 8 * kDim * sizeof(T));
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          multiply_add<T>(scores[r][n], q[r], k[0], k[1]);
          multiply_add<T>(scores[r][n + 1], q[r], k[2], k[3]);
        }
      }
    }
  }

  // scores become weights relative to the new maximum. rescale_out(r, half, factor): the sum in `out` for these rows
  // has to be multiplied by this factor. Called row by row, because few registers are left for factors.
  template <typename RescaleOut>
  FMD_DEVICE void online_softmax(Scores& scores, float scale_log2, RescaleOut rescale_out) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = maximum[r][half];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          largest = fmaxf(largest, fmaxf(scores[r][n][2 * half], scores[r][n][2 * half + 1]));
        }
        largest = max_of_row(largest);
        // No key seen yet: any finite number does, exp2 of -infinity is 0.
        const float offset = largest == negative_infinity() ? 0.0f : largest * scale_log2;
        const float factor = exp2_fast(maximum[r][half] * scale_log2 - offset);
        maximum[r][half] = largest;
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& weight = scores[r][n][2 * half + i];
            weight = exp2_fast(weight * scale_log2 - offset);
            total += weight;
          }
        }
        sum[r][half] = sum[r][half] * factor + total;
        rescale_out(r, half, factor);
      }
    }
  }

  FMD_DEVICE void rescale(int r, int half, float factor) {
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      out[r][d][2 * half] *= factor;
      out[r][d][2 * half + 1] *= factor;
    }
  }

  // Two neighbouring C fragments of weights, of keys 16 * step and on, as one A fragment.
  FMD_DEVICE static void fragment_of(uint32_t (&fragment)[4], const float (&weights)[kKeys / 8][4], int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = &weights[2 * step + i / 2][i % 2 * 2];
      fragment[i] = pack<T>(pair[0], pair[1]);
    }
  }

  // out += weights v. v_tile: swizzled [kKeys, kDim].
  FMD_DEVICE void accumulate(const Scores& weights, const T* v_tile) {
    const SharedAddress v_row = rows_address<kDim>(v_tile);
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      uint32_t w[kRowTiles][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) fragment_of(w[r], weights[r], step);
#pragma unroll
      for (int d = 0; d < kDim / 8; d += 2) {
        uint32_t v[4];  // two B fragments: eight dims each
        load_matrices_transposed(v, vecs_on(v_row, d) + step * 16 * kDim * sizeof(T));
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          multiply_add<T>(out[r][d], w[r], v[0], v[1]);
          multiply_add<T>(out[r][d + 1], w[r], v[2], v[3]);
        }
      }
    }
  }

  // Completes the sums.
  FMD_DEVICE void finish() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) sum[r][half] = sum_of_row(sum[r][half]);
    }
  }

  // After finish(). 0 and -infinity for a row that saw no key.
  FMD_DEVICE float inverse_sum(int r, int half) const { return sum[r][half] == 0.0f ? 0.0f : 1.0f / sum[r][half]; }
  FMD_DEVICE float lse(int r, int half, float scale_log2) const {
    if (sum[r][half] == 0.0f) return negative_infinity();
    return maximum[r][half] * scale_log2 * kLn2 + log_accurate(sum[r][half]);
  }
};

}  // namespace fmd::cuda

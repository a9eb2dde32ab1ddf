// What the lanes of a warp do together, and conversions of numbers.
#include <algorithm>

#include "cuda/device/intrinsics.h"

namespace fmd::cuda::host {
namespace {

// Row r of a warp's 8x8 matrix m comes from lane 8 m + r. The eight rows of a matrix are read at once: they must lie in
// different banks (groups of 16 bytes, eight of them).
void gather_matrices(Operands operands, uint16_t (&matrices)[4][8][8]) {
  for (int m = 0; m < 4; ++m) {
    unsigned banks = 0;
    for (int r = 0; r < 8; ++r) {
      const auto* operand = static_cast<const MatrixOperands*>(operands[8 * m + r]);
      std::memcpy(matrices[m][r], operand->row, 16);
      banks |= 1u << (reinterpret_cast<uintptr_t>(operand->row) / 16 % 8);
    }
    if (banks != 0xff) fail("ldmatrix: rows of a matrix share a bank");
  }
}

float element(BFloat16, uint32_t word, int half) {
  return to_float(BFloat16{static_cast<uint16_t>(word >> (16 * half))});
}
float element(Float16, uint32_t word, int half) {
  return to_float(Float16{static_cast<uint16_t>(word >> (16 * half))});
}

// Products are exact in fp32; the sum over k runs in order, which hardware does not promise.
template <typename T>
void multiply_add_all(Operands operands) {
  float a[16][16], b[16][8];
  for (int l = 0; l < kWarpSize; ++l) {
    const auto* mine = static_cast<const MultiplyOperands*>(operands[l]);
    const int row = l / 4, pair = l % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      a[row][pair + half] = element(T{}, mine->a[0], half);
      a[row + 8][pair + half] = element(T{}, mine->a[1], half);
      a[row][pair + 8 + half] = element(T{}, mine->a[2], half);
      a[row + 8][pair + 8 + half] = element(T{}, mine->a[3], half);
      b[pair + half][row] = element(T{}, mine->b[0], half);
      b[pair + 8 + half][row] = element(T{}, mine->b[1], half);
    }
  }
  float sums[16][8] = {};
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) sums[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int l = 0; l < kWarpSize; ++l) {
    const auto* mine = static_cast<const MultiplyOperands*>(operands[l]);
    for (int i = 0; i < 4; ++i) mine->c[i] += sums[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
  }
}

}  // namespace

void load_matrices(Operands operands) {
  uint16_t matrices[4][8][8];
  gather_matrices(operands, matrices);
  for (int l = 0; l < kWarpSize; ++l) {
    uint32_t* words = static_cast<const MatrixOperands*>(operands[l])->words;
    for (int m = 0; m < 4; ++m) std::memcpy(&words[m], &matrices[m][l / 4][l % 4 * 2], 4);
  }
}

void load_matrices_transposed(Operands operands) {
  uint16_t matrices[4][8][8];
  gather_matrices(operands, matrices);
  for (int l = 0; l < kWarpSize; ++l) {
    uint32_t* words = static_cast<const MatrixOperands*>(operands[l])->words;
    for (int m = 0; m < 4; ++m) {
      words[m] = matrices[m][l % 4 * 2][l / 4] | static_cast<uint32_t>(matrices[m][l % 4 * 2 + 1][l / 4]) << 16;
    }
  }
}

void multiply_add_bfloat16(Operands operands) { multiply_add_all<BFloat16>(operands); }
void multiply_add_float16(Operands operands) { multiply_add_all<Float16>(operands); }

void shuffle_xor(Operands operands) {
  for (int l = 0; l < kWarpSize; ++l) {
    auto* mine = static_cast<ShuffleOperands*>(operands[l]);
    if (mine->mask < 0 || mine->mask >= kWarpSize) fail("shuffle: accepted are masks 0 to 31");
    mine->result = static_cast<const ShuffleOperands*>(operands[l ^ mine->mask])->value;
  }
}

void warp_barrier(Operands) {}

float float16_to_float(uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> values(65536);
    for (int i = 0; i < 65536; ++i) {
      const int exponent = i >> 10 & 31, fraction = i & 1023;
      float value = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                  : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
      if (exponent == 31) {
        value = fraction == 0 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
      }
      values[i] = i >> 15 ? -value : value;
    }
    return values;
  }();
  return table[bits];
}

uint16_t float_to_float16(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  // In units of the last place, which nearbyint rounds to even: 2^-24 below 2^-14, else 2^-10 of the power below.
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int unit = magnitude == 0.0f ? -24 : std::max(exponent - 11, -24);
  const auto count = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -unit)));
  if (unit == -24) return static_cast<uint16_t>(sign | count);  // 1024 is the smallest normal number: bits fit
  return static_cast<uint16_t>(sign | (((unit + 24) << 10) + count));
}

uint16_t float_to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace fmd::cuda::host

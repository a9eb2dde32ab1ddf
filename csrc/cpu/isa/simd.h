// Vectors of float as wide as the instruction set at hand, through the vector extensions of GCC and Clang.
//
// Everything below csrc/cpu/isa/ lives in a namespace per instruction set and calls nothing inline from the standard
// library: the linker keeps one copy of an inline function, and it must not be the one compiled for a newer CPU.
#pragma once

#include <cstdint>
#include <utility>

#include "fmd/types.h"

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef FMD_ISA
#error "FMD_ISA must name the instruction set: baseline, avx2 or avx512"
#endif

#define FMD_INLINE inline __attribute__((always_inline))

namespace fmd::cpu::FMD_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kNumRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kNumRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kNumRegisters = 32;
#else
constexpr int kLanes = 4;
constexpr int kNumRegisters = 16;
#endif

typedef float VecF __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecH __attribute__((vector_size(2 * kLanes)));

template <typename Vec, typename T>
FMD_INLINE Vec load(const T* source) {
  Vec value;
  __builtin_memcpy(&value, source, sizeof(Vec));
  return value;
}

template <typename Vec, typename T>
FMD_INLINE void store(T* target, Vec value) {
  __builtin_memcpy(target, &value, sizeof(Vec));
}

template <typename To, typename From>
FMD_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// Subtracting 0 changes no value, not even -0, so that compilers drop it and keep the broadcast.
FMD_INLINE VecF splat(float value) { return value - VecF{}; }

// The first argument where the two are unordered.
FMD_INLINE VecF max(VecF a, VecF b) { return b > a ? b : a; }

FMD_INLINE int64_t min(int64_t a, int64_t b) { return b < a ? b : a; }
FMD_INLINE int64_t max(int64_t a, int64_t b) { return b > a ? b : a; }

// 2^x for x <= 0, relative error below 2e-7; not less than 2^-126; NaN gives NaN.
FMD_INLINE VecF exp2_nonpositive(VecF x) {
  // Adding it rounds to an integer, and leaves integer + 127, the exponent field of 2^integer, in the low bits.
  constexpr float kRound = 12582912.0f + 127.0f;
  x = x < -126.0f ? splat(-126.0f) : x;
  const VecF rounded = x + kRound;
  const VecF f = x - (rounded - kRound);  // in [-0.5, 0.5]
  // Minimax fit of (2^f - 1) / f, so that 2^0 is exactly 1.
  VecF p = splat(0x1.5bba14p-10f);
  p = p * f + 0x1.3cea88p-7f;
  p = p * f + 0x1.c6b752p-5f;
  p = p * f + 0x1.ebf9bcp-3f;
  p = p * f + 0x1.62e42ap-1f;
  p = p * f + 1.0f;
  return p * bit_cast<VecF>(bit_cast<VecI>(rounded) << 23);
}

// ---- transposes ----

// The lower (kHalf 0) or upper (1) halves of a and b, element by element in turn.
template <int kHalf, int... kIndex>
FMD_INLINE VecF interleave(VecF a, VecF b, std::integer_sequence<int, kIndex...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (kHalf * kLanes / 2 + kIndex / 2 + kIndex % 2 * kLanes)...);
#else
  return __builtin_shuffle(a, b, VecI{(kHalf * kLanes / 2 + kIndex / 2 + kIndex % 2 * kLanes)...});
#endif
}

// source [kLanes, kLanes] with source_stride -> its transpose in target with target_stride.
FMD_INLINE void transpose_square(const float* source, int64_t source_stride, float* target, int64_t target_stride) {
  constexpr auto kIndices = std::make_integer_sequence<int, kLanes>{};
  VecF rows[kLanes], shuffled[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) rows[i] = load<VecF>(source + i * source_stride);
  // A perfect shuffle of the rows, log2(kLanes) times over, exchanges the bits of row and column index.
#pragma GCC unroll 4
  for (int width = 1; width < kLanes; width *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      shuffled[2 * i] = interleave<0>(rows[i], rows[i + kLanes / 2], kIndices);
      shuffled[2 * i + 1] = interleave<1>(rows[i], rows[i + kLanes / 2], kIndices);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = shuffled[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(target + i * target_stride, rows[i]);
}

// source [num_rows, num_columns] with source_stride -> target [num_columns, num_rows] with target_stride.
inline void transpose(const float* __restrict source, int64_t source_stride, int64_t num_rows, int64_t num_columns,
                      float* __restrict target, int64_t target_stride) {
  const int64_t square_rows = num_rows / kLanes * kLanes, square_columns = num_columns / kLanes * kLanes;
  for (int64_t row = 0; row < square_rows; row += kLanes) {
    for (int64_t column = 0; column < square_columns; column += kLanes) {
      transpose_square(source + row * source_stride + column, source_stride, target + column * target_stride + row,
                       target_stride);
    }
  }
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t column = row < square_rows ? square_columns : 0; column < num_columns; ++column) {
      target[column * target_stride + row] = source[row * source_stride + column];
    }
  }
}

// ---- storage types: kLanes consecutive elements to and from fp32 ----

FMD_INLINE VecF load_bfloat16(const uint16_t* source) {
  return bit_cast<VecF>(__builtin_convertvector(load<VecH>(source), VecU) << 16);
}

// Rounds to nearest, ties to even. A NaN stays one (quiet).
FMD_INLINE void store_bfloat16(uint16_t* target, VecF value) {
  const VecU bits = bit_cast<VecU>(value);
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecU quiet = (bits >> 16) | 0x40u;
  store(target, __builtin_convertvector((value == value) ? rounded : quiet, VecH));
}

FMD_INLINE VecF load_float16(const uint16_t* source) {
#if defined(__AVX512F__)
  // The masked forms, here and below, keep GCC 12 from warning about an operand that the plain ones leave undefined.
  return bit_cast<VecF>(_mm512_maskz_cvtph_ps(0xffff, load<__m256i>(source)));
#elif defined(__F16C__)
  return bit_cast<VecF>(_mm256_cvtph_ps(load<__m128i>(source)));
#else
  const VecU bits = __builtin_convertvector(load<VecH>(source), VecU);
  const VecU magnitude = bits & 0x7fffu;
  // 2^112 moves the exponent from fp16's bias to fp32's, and normalises subnormals.
  VecU value = bit_cast<VecU>(bit_cast<VecF>(magnitude << 13) * 0x1p112f);
  value = (magnitude >= 0x7c00u) ? (value | 0x7f800000u) : value;  // infinities and NaN
  return bit_cast<VecF>(value | ((bits & 0x8000u) << 16));
#endif
}

FMD_INLINE void store_float16(uint16_t* target, VecF value) {
#if defined(__AVX512F__)
  store(target, _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  store(target, _mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
#else
  const VecU bits = bit_cast<VecU>(value);
  const VecU magnitude = bits & 0x7fffffffu;
  // Subnormal results: adding 0.5 puts the units of fp16's subnormals at the end of the mantissa, rounded to even.
  const VecU subnormal = bit_cast<VecU>(bit_cast<VecF>(magnitude) + 0.5f) - 0x3f000000u;
  VecU result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  result = (magnitude < 0x38800000u) ? subnormal : result;
  result = (magnitude >= 0x477ff000u) ? (VecU{} + 0x7c00u) : result;  // 65520 and above round to infinity
  result = (magnitude > 0x7f800000u) ? (VecU{} + 0x7e00u) : result;   // NaN
  store(target, __builtin_convertvector(result | ((bits >> 16) & 0x8000u), VecH));
#endif
}

// In place of bytes_of(), see above.
FMD_INLINE int64_t dtype_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

FMD_INLINE const void* element(const void* base, DType dtype, int64_t index) {
  return static_cast<const char*>(base) + index * dtype_size(dtype);
}
FMD_INLINE void* element(void* base, DType dtype, int64_t index) {
  return static_cast<char*>(base) + index * dtype_size(dtype);
}

// target[i] = source[i] for count elements.
template <typename T, typename Load>
FMD_INLINE void widen_with(const T* source, float* target, int64_t count, Load load_vector) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(target + i, load_vector(source + i));
  if (i < count) {
    T padded[kLanes] = {};
    __builtin_memcpy(padded, source + i, (count - i) * sizeof(T));
    const VecF value = load_vector(padded);
    __builtin_memcpy(target + i, &value, (count - i) * sizeof(float));
  }
}

FMD_INLINE void widen(DType dtype, const void* source, float* target, int64_t count) {
  if (dtype == DType::kFloat32) {
    widen_with(static_cast<const float*>(source), target, count, [](const float* from) { return load<VecF>(from); });
  } else if (dtype == DType::kBFloat16) {
    widen_with(static_cast<const uint16_t*>(source), target, count, load_bfloat16);
  } else {
    widen_with(static_cast<const uint16_t*>(source), target, count, load_float16);
  }
}

// target[i] = source[i], rounded to nearest, for count elements.
template <typename T, typename Store>
FMD_INLINE void narrow_with(const float* source, T* target, int64_t count, Store store_vector) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_vector(target + i, load<VecF>(source + i));
  if (i < count) {
    VecF value = {};
    T padded[kLanes];
    __builtin_memcpy(&value, source + i, (count - i) * sizeof(float));
    store_vector(padded, value);
    __builtin_memcpy(target + i, padded, (count - i) * sizeof(T));
  }
}

FMD_INLINE void narrow(DType dtype, const float* source, void* target, int64_t count) {
  if (dtype == DType::kFloat32) {
    narrow_with(source, static_cast<float*>(target), count, [](float* to, VecF value) { store(to, value); });
  } else if (dtype == DType::kBFloat16) {
    narrow_with(source, static_cast<uint16_t*>(target), count, store_bfloat16);
  } else {
    narrow_with(source, static_cast<uint16_t*>(target), count, store_float16);
  }
}

}  // namespace fmd::cpu::FMD_ISA

// Vectors of what is rotated, and of the angles.
#pragma once

#include "cuda/device/intrinsics.h"
#include "fmd/append.h"

namespace fmd::cuda {

template <typename T, int kElements>
struct alignas(sizeof(T) * kElements) RopeVec {
  T element[kElements];
};

template <typename T, int kElements>
FMD_DEVICE void read_floats(const T* from, float (&to)[kElements]) {
  constexpr int kVec = kElements < 16 / static_cast<int>(sizeof(T)) ? kElements : 16 / static_cast<int>(sizeof(T));
#pragma unroll
  for (int i = 0; i < kElements; i += kVec) {
    const auto vec = *reinterpret_cast<const RopeVec<T, kVec>*>(from + i);
#pragma unroll
    for (int j = 0; j < kVec; ++j) to[i + j] = to_float(vec.element[j]);
  }
}

template <typename T, int kElements>
FMD_DEVICE void read_angles(const RopeAppendParams& params, const void* angles, int64_t at, float (&to)[kElements]) {
  if (params.angle_dtype == DType::kFloat32) {
    read_floats(static_cast<const float*>(angles) + at, to);
  } else {
    read_floats(static_cast<const T*>(angles) + at, to);
  }
}

}  // namespace fmd::cuda

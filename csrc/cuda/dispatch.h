// The one place that turns run-time dtypes and sizes into template arguments: what it names is all that is
// instantiated.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/device/intrinsics.h"
#include "fmd/types.h"

namespace fmd::cuda {

template <typename T_, int kDim_>
struct Instance {
  using T = T_;
  static constexpr int kDim = kDim_;
};

// Calls launch(Instance<T, head_dim>{}).
template <typename Launch>
void dispatch_attention(const char* name, DType dtype, int64_t head_dim, const Launch& launch) {
  if (dtype == DType::kBFloat16 && head_dim == 64) return launch(Instance<BFloat16, 64>{});
  if (dtype == DType::kBFloat16 && head_dim == 128) return launch(Instance<BFloat16, 128>{});
  if (dtype == DType::kFloat16 && head_dim == 64) return launch(Instance<Float16, 64>{});
  if (dtype == DType::kFloat16 && head_dim == 128) return launch(Instance<Float16, 128>{});
  throw std::invalid_argument(std::string(name) + ": head_dim " + std::to_string(head_dim) + " of " +
                              std::to_string(dtype == DType::kFloat32 ? 32 : 16) +
                              "-bit elements, accepted on CUDA are head_dim 64 and 128 of bfloat16 and float16");
}

// Calls launch(T{}).
template <typename Launch>
void dispatch_float(DType dtype, const Launch& launch) {
  switch (dtype) {
    case DType::kFloat32:
      return launch(float{});
    case DType::kBFloat16:
      return launch(BFloat16{});
    case DType::kFloat16:
      return launch(Float16{});
  }
}

// Whether rows at these strides (in elements) from `pointer` all begin at a multiple of `bytes`.
template <typename... Strides>
bool is_aligned(int bytes, DType dtype, const void* pointer, Strides... strides) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0 && ((strides * bytes_of(dtype) % bytes == 0) && ...);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fmd::cuda

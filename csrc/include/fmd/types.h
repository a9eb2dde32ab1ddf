// What all parameter structs share. They cross from the host to a kernel: raw pointers, sizes and strides. No torch
// header, no ownership.
//
// Strides are in elements. The innermost dimension (head_dim, hidden_size) is always contiguous.
// Offsets are 64-bit everywhere: a cache of more than 2^31 elements is ordinary.
//
// Launchers trust their parameters: indices in range, strides right. Results do not depend on the number of threads.
// On CUDA (sm_80 and up) all pointers, indices too, are device memory of the current device, and `stream` is a
// cudaStream_t of it. A CUDA launcher never waits for the device and reads nothing back, so that it can be captured in
// a graph; a launch that CUDA refuses is a std::runtime_error.
#pragma once

#include <cstdint>

namespace fmd {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Runs body(ctx, begin, end) over sub-ranges of [0, count). The caller supplies it, so that threads follow the
// host framework's setting and this folder stays free of it.
using ParallelFor = void (*)(int64_t count, int64_t grain, void (*body)(void* ctx, int64_t begin, int64_t end),
                             void* ctx);

}  // namespace fmd

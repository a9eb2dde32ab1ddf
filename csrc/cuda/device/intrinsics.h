// The device operations that kernels are written in, with two implementations of the same names: intrinsics.cuh for
// nvcc, and tests/support/cuda_host/intrinsics.h, which executes the blocks of a grid on the CPU. A kernel source uses
// nothing else of CUDA, so that the very same source runs in the tests of a machine without a GPU.
//
// - thread_index(), block_index(): of a one-dimensional launch.
// - shared_memory<T>(): the block's dynamic shared memory, 1024-byte aligned.
// - block_barrier(), warp_barrier().
// - shuffle_xor(value, mask): of a whole warp.
// - copy_async_16(to, from, valid): 16 bytes from global to shared memory; zeros, and `from` not read, if not valid.
// - copy_async_commit(), copy_async_wait<N>(): waits for all but the newest N groups of copies; a barrier must follow
//   before anything is read.
// - shared_address(pointer): an integer to compute with.
// - load_matrices(words, row), load_matrices_transposed(words, row): ldmatrix.x4, four 8x8 matrices of 16-bit elements;
//   lane l gives the address of row l % 8 of matrix l / 8.
// - multiply_add<T>(c, a, b0, b1): mma.m16n8k16, fp32 c += a * b.
// - to_float(x), from_float<T>(x), pack<T>(low, high).
// - exp2_fast(x): flushes subnormals, 0 for -infinity; log_accurate(x); negative_infinity().
// - launch(name, kernel, blocks, threads, shared_bytes, stream, params...).
// - multiprocessors(), compute_capability(): of the current device; 80 is 8.0.
#pragma once

#include <cstdint>

namespace fmd::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct alignas(16) Vec16 {
  uint32_t word[4];
};

constexpr int kWarpSize = 32;

}  // namespace fmd::cuda

#ifdef __CUDACC__
#include "cuda/device/intrinsics.cuh"
#else
#include "cuda_host/intrinsics.h"
#endif

// The intrinsics layer for nvcc, sm_80 and up. See intrinsics.h for what each name means.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#define FMD_DEVICE __device__ __forceinline__
#define FMD_KERNEL(threads, min_blocks) __global__ void __launch_bounds__(threads, min_blocks)

namespace fmd::cuda {

FMD_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FMD_DEVICE int64_t block_index() { return blockIdx.x; }

template <typename T>
FMD_DEVICE T* shared_memory() {
  extern __shared__ __align__(1024) unsigned char fmd_shared_memory[];
  return reinterpret_cast<T*>(fmd_shared_memory);
}

FMD_DEVICE void block_barrier() { __syncthreads(); }
FMD_DEVICE void warp_barrier() { __syncwarp(); }

FMD_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

using SharedAddress = uint32_t;
FMD_DEVICE SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

FMD_DEVICE void copy_async_16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0)
               : "memory");
}
FMD_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPendingGroups>
FMD_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPendingGroups) : "memory");
}

FMD_DEVICE void load_matrices(uint32_t (&words)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}
FMD_DEVICE void load_matrices_transposed(uint32_t (&words)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}

template <typename T>
FMD_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
FMD_DEVICE void multiply_add<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
FMD_DEVICE void multiply_add<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

FMD_DEVICE float to_float(float value) { return value; }
FMD_DEVICE float to_float(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
FMD_DEVICE float to_float(Float16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

// Both round to nearest, ties to even.
template <typename T>
FMD_DEVICE uint32_t pack(float low, float high);
template <>
FMD_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
template <>
FMD_DEVICE uint32_t pack<Float16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
template <typename T>
FMD_DEVICE T from_float(float value) {
  return T{static_cast<uint16_t>(pack<T>(value, 0.0f))};
}
template <>
FMD_DEVICE float from_float<float>(float value) {
  return value;
}

FMD_DEVICE float negative_infinity() { return __uint_as_float(0xff800000u); }

FMD_DEVICE float exp2_fast(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
FMD_DEVICE float log_accurate(float value) { return logf(value); }

inline void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline int current_device() {
  int device = 0;
  require(cudaGetDevice(&device), "fmd_ext: cudaGetDevice");
  return device;
}

inline int multiprocessors() {
  int count = 0;
  require(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, current_device()),
          "fmd_ext: cudaDeviceGetAttribute");
  return count;
}

inline int compute_capability() {
  int major = 0, minor = 0;
  require(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, current_device()),
          "fmd_ext: cudaDeviceGetAttribute");
  require(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, current_device()),
          "fmd_ext: cudaDeviceGetAttribute");
  return 10 * major + minor;
}

// Never waits for the device. Throws std::runtime_error when the launch itself is refused.
template <typename... Params>
void launch(const char* name, void (*kernel)(Params...), int64_t blocks, int threads, int shared_bytes, void* stream,
            const Params&... params) {
  if (blocks > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error(std::string(name) + ": " + std::to_string(blocks) +
                             " blocks, accepted are fewer than 2^31");
  }
  // Above 48 KiB a kernel has to opt in.
  if (shared_bytes > 48 * 1024) {
    require(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name);
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params...);
  require(cudaGetLastError(), name);
}

}  // namespace fmd::cuda

// The operations between grids for nvcc. See grid.h for what each name means.
#pragma once

#include "cuda/device/grid.h"

namespace fmd::cuda {

// Code for a device below sm_90 (that of newer ones is made from it) has none of it: launch_behind() is ordinary there.
FMD_DEVICE void allow_blocks_behind() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
FMD_DEVICE void wait_for_kernel_ahead() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

FMD_DEVICE int take_number(int* counter) { return atomicAdd(counter, 1); }

inline void clear_memory(void* pointer, size_t bytes, void* stream) {
  require(cudaMemsetAsync(pointer, 0, bytes, static_cast<cudaStream_t>(stream)), "fmd_ext: cudaMemsetAsync");
}

inline int64_t blocks_at_once(int shared_bytes) {
  int bytes = 0;
  require(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, current_device()),
          "fmd_ext: cudaDeviceGetAttribute");
  constexpr int kReservedBytes = 1024;  // per block, by CUDA
  const int64_t fit = bytes / (shared_bytes + kReservedBytes);
  return (fit < 1 ? 1 : fit) * multiprocessors();
}

template <typename... Params>
void launch_ahead(const char* name, void (*kernel)(Params...), int64_t blocks, int threads, int shared_bytes,
                  void* stream, const Params&... params) {
  launch(name, kernel, blocks, threads, shared_bytes, stream, params...);
}

template <typename... Params>
void launch_behind(const char* name, void (*kernel)(Params...), int64_t blocks, int threads, int shared_bytes,
                   void* stream, const Params&... params) {
  if (compute_capability() != 90) return launch(name, kernel, blocks, threads, shared_bytes, stream, params...);
  if (blocks > std::numeric_limits<int32_t>::max() || shared_bytes > 48 * 1024) {
    throw std::runtime_error(std::string(name) + ": accepted are fewer than 2^31 blocks of at most 48 KiB");
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  require(cudaLaunchKernelEx(&config, kernel, params...), name);
}

}  // namespace fmd::cuda

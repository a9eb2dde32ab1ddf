// What every op file needs. An op has one file, which is compiled twice: into the CPU library, which takes the schema
// and the CPU part, and, with FMD_FOR_CUDA, into the CUDA library, which adds its part to the op. The CPU library is
// always loaded first.
//
// Index values stay on a CUDA device: what the CPU part checks of them is the caller's word there, so that no op waits
// for the device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "checks.h"
#ifndef FMD_FOR_CUDA
#include "cpu/kernels.h"
#endif

#ifdef FMD_FOR_CUDA

// FMD_OP(op, "(arguments) -> result"): makes the function `op` of this file the implementation of fmd_ext::op.
#define FMD_OP(op, signature) \
  STABLE_TORCH_LIBRARY_IMPL(fmd_ext, CUDA, library) { library.impl(#op, TORCH_BOX(&op)); }

namespace fmd {

// Makes the device of a tensor the current one while it lives.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }

  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace fmd

#else

#define FMD_OP(op, signature)                                                     \
  STABLE_TORCH_LIBRARY_FRAGMENT(fmd_ext, library) { library.def(#op signature); } \
  STABLE_TORCH_LIBRARY_IMPL(fmd_ext, CPU, library) { library.impl(#op, TORCH_BOX(&op)); }

namespace fmd {

// torch's own thread pool, so that torch.set_num_threads() holds.
inline void torch_parallel_for(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* ctx) {
  if (count <= 0) return;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(ctx, begin, end); });
}

}  // namespace fmd

#endif

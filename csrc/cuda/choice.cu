#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/choice.h"
#include "cuda/device/intrinsics.h"
#include "fmd/library.h"

namespace fmd::cuda {
namespace {

struct Kernel {
  const char *op, *name, *sources, *passed_on;
  int capability;  // 0: any
};
// Those of one op stand together, the oldest first.
constexpr Kernel kKernels[] = {
#define FMD_CUDA_KERNEL(op, name, sources, passed_on, capability) {op, name, sources, passed_on, capability},
#include "generated/cuda_kernels.inc"
#undef FMD_CUDA_KERNEL
};
constexpr int kNumKernels = sizeof(kKernels) / sizeof(kKernels[0]);

// By the op's first kernel: 1 + the index of the one chosen by name, or 0 for "auto".
std::atomic<int> choices[kNumKernels];

bool is(const char* a, const char* b) { return std::strcmp(a, b) == 0; }

int first_of(const char* op) {
  for (int i = 0; i < kNumKernels; ++i) {
    if (is(kKernels[i].op, op)) return i;
  }
  return -1;
}

// capability: called only where a kernel needs one.
template <typename Capability>
int choose(int first, const Capability& capability) {
  const int chosen = choices[first].load(std::memory_order_relaxed);
  if (chosen > 0) return chosen - 1;
  int newest = first;
  for (int i = first; i < kNumKernels && is(kKernels[i].op, kKernels[first].op); ++i) {
    const Kernel& kernel = kKernels[i];
    const bool passed = kernel.passed_on[0] != '\0';
    if (passed && (kernel.capability == 0 || kernel.capability == capability())) newest = i;
  }
  return newest;
}

std::string dotted(int capability) { return std::to_string(capability / 10) + "." + std::to_string(capability % 10); }

}  // namespace

bool runs(const char* op, const char* kernel) {
  const Kernel& chosen = kKernels[choose(first_of(op), compute_capability)];
  if (chosen.capability != 0 && chosen.capability != compute_capability()) {
    throw std::runtime_error(std::string(op) + ": the kernel " + chosen.name + " was chosen, which runs on compute " +
                             "capability " + dotted(chosen.capability) + "; this device has " +
                             dotted(compute_capability()));
  }
  return is(chosen.name, kernel);
}

}  // namespace fmd::cuda

extern "C" {

const char* fmd_ext_select_cuda_kernel(const char* op, const char* name) {
  using namespace fmd::cuda;
  static thread_local std::string reason;
  const int first = first_of(op);
  if (first < 0) {
    reason = "unknown op '" + std::string(op) + "'; accepted:";
    for (int i = 0; i < kNumKernels; ++i) {
      if (first_of(kKernels[i].op) == i) reason += std::string(i > 0 ? ", " : " ") + kKernels[i].op;
    }
    return reason.c_str();
  }
  reason = "unknown CUDA kernel '" + std::string(name) + "' of " + op + "; accepted: auto";
  if (is(name, "auto")) {
    choices[first] = 0;
    return nullptr;
  }
  for (int i = first; i < kNumKernels && is(kKernels[i].op, op); ++i) {
    if (is(kKernels[i].name, name)) {
      choices[first] = i + 1;
      return nullptr;
    }
    reason += std::string(", ") + kKernels[i].name;
  }
  return reason.c_str();
}

const char* fmd_ext_cuda_kernel(const char* op, int capability) {
  using namespace fmd::cuda;
  const int first = first_of(op);
  return first < 0 ? "" : kKernels[choose(first, [&] { return capability; })].name;
}

const char* fmd_ext_cuda_kernels() {
  using namespace fmd::cuda;
  static const std::string text = [] {
    std::string lines;
    for (const Kernel& kernel : kKernels) {
      lines += std::string(kernel.op) + "\t" + kernel.name + "\t" + std::to_string(kernel.capability) + "\t" +
               kernel.sources + "\t" + kernel.passed_on + "\n";
    }
    return lines;
  }();
  return text.c_str();
}
}

// Which prefill kernel runs.
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/branched_prefill.h"
#include "cuda/sm80/clear.h"
#include "fmd/library.h"

namespace fmd {
namespace cuda {
namespace {

enum class Choice { kAuto, kSm80, kSm90 };
constexpr const char* kChoices[] = {"auto", "sm80", "sm90"};
std::atomic<Choice> choice{Choice::kAuto};

}  // namespace
}  // namespace cuda

void launch_branched_prefill_cuda(const BranchedAttentionParams& params, void* stream) {
  using namespace cuda;
  const bool sm90 = choice.load(std::memory_order_relaxed) == Choice::kSm90;
  if (sm90 && compute_capability() != 90) {
    throw std::runtime_error(
        "branched_prefill: the kernel sm90 was chosen, which runs on compute capability 9.0; "
        "this device has " +
        std::to_string(compute_capability() / 10) + "." + std::to_string(compute_capability() % 10));
  }
  if (params.num_rows > 0) clear_other_rows(params, stream);
  sm90 ? launch_sm90_branched_prefill(params, stream) : launch_sm80_branched_prefill(params, stream);
}

}  // namespace fmd

extern "C" {

const char* fmd_ext_select_cuda_prefill(const char* name) {
  using namespace fmd::cuda;
  static thread_local std::string reason;
  for (int i = 0; i < 3; ++i) {
    if (std::strcmp(name, kChoices[i]) != 0) continue;
    choice = static_cast<Choice>(i);
    return nullptr;
  }
  reason = "unknown CUDA prefill kernel '" + std::string(name) + "'; accepted: auto, sm80, sm90";
  return reason.c_str();
}

// "auto" is sm80 until the other kernel is known to be faster: both have passed their tests on a device of 9.0.
const char* fmd_ext_cuda_prefill() {
  using namespace fmd::cuda;
  return kChoices[static_cast<int>(choice == Choice::kSm90 ? Choice::kSm90 : Choice::kSm80)];
}
}

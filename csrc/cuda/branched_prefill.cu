// Which prefill kernel runs.
#include "cuda/branched_prefill.h"
#include "cuda/choice.h"
#include "cuda/sm80/clear.h"

namespace fmd {

int64_t branched_prefill_workspace_cuda(const BranchedAttentionParams&) {
  return cuda::runs("branched_prefill", "sm90") ? cuda::kSm90PrefillWorkspace : 0;
}

void launch_branched_prefill_cuda(const BranchedAttentionParams& params, void* workspace, void* stream) {
  using namespace cuda;
  const bool sm90 = runs("branched_prefill", "sm90");
  if (params.num_rows > 0) clear_other_rows(params, stream);
  sm90 ? launch_sm90_branched_prefill(params, workspace, stream) : launch_sm80_branched_prefill(params, stream);
}

}  // namespace fmd

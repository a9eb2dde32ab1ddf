// Which decode kernel runs.
#include "cuda/branched_decode.h"
#include "cuda/choice.h"
#include "cuda/sm80/clear.h"

namespace fmd {
namespace {

bool is_persistent(const BranchedAttentionParams& params) {
  return cuda::runs("branched_decode", "persistent") && cuda::persistent_decode_takes(params);
}

}  // namespace

int64_t branched_decode_workspace_cuda(const BranchedAttentionParams& params, bool fixed_split) {
  return is_persistent(params) ? cuda::persistent_decode_workspace(params, fixed_split)
                               : cuda::split_decode_workspace(params, fixed_split);
}

void launch_branched_decode_cuda(const BranchedAttentionParams& params, bool fixed_split, void* workspace,
                                 void* stream) {
  if (params.num_rows > 0) cuda::clear_other_rows(params, stream);
  is_persistent(params) ? cuda::launch_persistent_decode(params, fixed_split, workspace, stream)
                        : cuda::launch_split_decode(params, fixed_split, workspace, stream);
}

}  // namespace fmd

// The two decode kernels. Each takes a workspace of as many bytes as it says, 16-byte aligned.
#pragma once

#include "fmd/branched_attention.h"

namespace fmd::cuda {

int64_t split_decode_workspace(const BranchedAttentionParams& params, bool fixed_split);
void launch_split_decode(const BranchedAttentionParams& params, bool fixed_split, void* workspace, void* stream);

// At most kMaxScannedGroups groups.
int64_t persistent_decode_workspace(const BranchedAttentionParams& params, bool fixed_split);
void launch_persistent_decode(const BranchedAttentionParams& params, bool fixed_split, void* workspace, void* stream);
bool persistent_decode_takes(const BranchedAttentionParams& params);

}  // namespace fmd::cuda

#pragma once

#include "fmd/branched_attention.h"

namespace fmd::cuda {

// Does nothing where the groups hold every row.
void clear_other_rows(const BranchedAttentionParams& params, void* stream);

}  // namespace fmd::cuda

#pragma once

#include "fmd/params.h"

namespace fmd::cuda {

// Does nothing where the groups hold every row.
void clear_other_rows(const BranchedAttentionParams& params, void* stream);

}  // namespace fmd::cuda

// Which append kernels run.
#include "cuda/append.h"
#include "cuda/choice.h"

namespace fmd {

void launch_append_cuda(const AppendParams& params, void* stream) {
  using namespace cuda;
  if (params.num_rows == 0) return;
  runs("append_", "wide") ? launch_wide_append(params, stream) : launch_narrow_append(params, stream);
}

void launch_rope_append_cuda(const RopeAppendParams& params, void* stream) {
  using namespace cuda;
  if (params.append.num_rows == 0) return;
  runs("rope_append_", "wide") ? launch_wide_rope_append(params, stream) : launch_narrow_rope_append(params, stream);
}

}  // namespace fmd

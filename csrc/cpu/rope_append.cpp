// Spreads the rows of a rope_append over threads.
#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"
#include "fmd/launch.h"

namespace fmd {

void launch_rope_append_cpu(const RopeAppendParams& params, ParallelFor parallel_for) {
  // About 16 thousand rotated elements are worth a thread.
  const int64_t row_elements = (params.num_qo_heads + params.append.num_kv_heads) * params.append.head_dim;
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, row_elements));
  parallel_for(
      params.append.num_rows, grain,
      [](void* erased, int64_t begin, int64_t end) {
        cpu::kernels().rope_append_rows(*static_cast<const RopeAppendParams*>(erased), begin, end);
      },
      const_cast<RopeAppendParams*>(&params));
}

}  // namespace fmd

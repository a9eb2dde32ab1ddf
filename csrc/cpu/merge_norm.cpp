// Spreads the rows of a merge with norm over threads.
#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"
#include "fmd/launch.h"

namespace fmd {

void launch_merge_norm_cpu(const MergeNormParams& params, const ParallelFor& parallel_for) {
  // About 32 thousand elements are worth a thread.
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, params.hidden_size));
  parallel_for.run(
      parallel_for, params.num_home, grain,
      [](void* erased, int64_t begin, int64_t end) {
        cpu::kernels().merge_norm_rows(*static_cast<const MergeNormParams*>(erased), begin, end);
      },
      const_cast<MergeNormParams*>(&params));
}

}  // namespace fmd

// Spreads the pairs of a merge over threads.
#include <algorithm>
#include <cstdint>

#include "cpu/kernels.h"
#include "fmd/launch.h"

namespace fmd {

void launch_merge_cpu(const MergeParams& params, ParallelFor parallel_for) {
  // About 32 thousand elements are worth a thread.
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, params.hidden_size));
  parallel_for(
      params.num_pairs, grain,
      [](void* erased, int64_t begin, int64_t end) {
        cpu::kernels().merge_pairs(*static_cast<const MergeParams*>(erased), begin, end);
      },
      const_cast<MergeParams*>(&params));
}

}  // namespace fmd

// Launch of the ops whose rows are independent of each other.
#pragma once

#include "cpu/isa/simd.h"
#include "fmd/types.h"

namespace fmd::cpu::FMD_ISA {

// Runs kRun(params, begin, end) over sub-ranges of [0, count). row_work: what one row takes, in the unit of
// thread_work, which is worth a thread.
template <typename Params, void (*kRun)(const Params& params, int64_t begin, int64_t end)>
void launch_rows(const Params& params, int64_t count, int64_t row_work, int64_t thread_work, ParallelFor parallel_for) {
  parallel_for(
      count, max(1, thread_work / max(1, row_work)),
      [](void* erased, int64_t begin, int64_t end) { kRun(*static_cast<const Params*>(erased), begin, end); },
      const_cast<Params*>(&params));
}

}  // namespace fmd::cpu::FMD_ISA

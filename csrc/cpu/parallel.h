// Dynamic scheduling over the caller's ParallelFor. For the launchers only, never for csrc/cpu/isa/.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "fmd/types.h"

namespace fmd::cpu {

// Scalar multiplications that take about 20 us: for less it is not worth waking a thread.
constexpr int64_t kProductsPerThread = 1 << 20;

// Runs body(i) for every i in [0, count), lowest i first, each on the thread that is free next: items that differ in
// cost still keep all threads busy. What an item computes must not depend on the thread it runs on.
// products: scalar multiplications of all items together, about.
template <typename Body>
void for_each_item(ParallelFor parallel_for, int64_t count, int64_t products, const Body& body) {
  struct Context {
    const Body& body;
    int64_t count;
    std::atomic<int64_t> next{0};
  } context{body, count};
  const int64_t grain = std::max<int64_t>(1, count * kProductsPerThread / std::max<int64_t>(1, products));
  // The ranges only say how many threads there are: whoever comes first takes the next item, and the last range may
  // find nothing left.
  parallel_for(
      count, grain,
      [](void* erased, int64_t, int64_t) {
        Context& shared = *static_cast<Context*>(erased);
        for (int64_t i = shared.next++; i < shared.count; i = shared.next++) shared.body(i);
      },
      &context);
}

}  // namespace fmd::cpu

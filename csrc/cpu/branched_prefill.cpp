// Cuts branched_prefill into blocks of query rows and runs them, the costliest first.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "fmd/launch.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace fmd {

void launch_branched_prefill_cpu(const BranchedAttentionParams& params, const ParallelFor& parallel_for) {
  const cpu::KernelTable& kernels = cpu::kernels();
  const int64_t group_size = params.num_qo_heads / params.num_kv_heads;
  const int64_t block_queries = std::max<int64_t>(1, kernels.block_rows / group_size);

  struct Item {
    cpu::PrefillBlock block;
    int64_t cost;  // query-key pairs, about
  };
  std::vector<Item> items;
  for (int64_t group = 0; group < params.num_groups; ++group) {
    const int64_t qo_len = params.cu_seqlens_q[group + 1] - params.cu_seqlens_q[group];
    const Segment& segment = params.segments[group];
    for (int64_t begin = 0; begin < qo_len; begin += block_queries) {
      const int64_t count = std::min(block_queries, qo_len - begin);
      const int64_t keys = segment.prefix_len + std::max<int64_t>(0, segment.kv_len - qo_len + begin + count);
      for (int64_t head = 0; head < params.num_kv_heads; ++head) {
        items.push_back({{group, head, begin, count}, count * keys});
      }
    }
  }
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
  cpu::for_each_item(parallel_for, static_cast<int64_t>(items.size()),
                     [&](int64_t i) { kernels.prefill_block(params, items[i].block); });
}

}  // namespace fmd

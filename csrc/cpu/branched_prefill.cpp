// Cuts branched_prefill into blocks of query rows and runs them, the costliest first.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "fmd/branched_attention.h"

namespace fmd {
namespace {

// Rows (queries times heads_per_kv) of a block. The rows share each K/V tile, so more of them mean less cache traffic;
// q and out of a block (fp32) fill half of a second-level cache of 1 MiB, and few enough rows leave work for all
// threads.
int64_t block_rows(int64_t head_dim) {
  constexpr int64_t kBlockBytes = 512 * 1024;
  const int64_t rows = kBlockBytes / (2 * head_dim * static_cast<int64_t>(sizeof(float)));
  return std::clamp<int64_t>(rows, 32, 448);
}

}  // namespace

void launch_branched_prefill_cpu(const BranchedAttentionParams& params, ParallelFor parallel_for) {
  const cpu::KernelTable& kernels = cpu::kernels();
  const int64_t heads_per_kv = params.num_qo_heads / params.num_kv_heads;
  const int64_t block_queries = std::max<int64_t>(1, block_rows(params.head_dim) / heads_per_kv);

  struct Item {
    cpu::PrefillBlock block;
    int64_t cost;  // query-key pairs, about
  };
  std::vector<Item> items;
  int64_t products = 0;
  for (int64_t group = 0; group < params.num_groups; ++group) {
    const int64_t qo_len = params.cu_seqlens_q[group + 1] - params.cu_seqlens_q[group];
    const KeyRanges& ranges = params.key_ranges[group];
    for (int64_t begin = 0; begin < qo_len; begin += block_queries) {
      const int64_t count = std::min(block_queries, qo_len - begin);
      const int64_t keys = ranges.prefix_len + std::max<int64_t>(0, ranges.kv_len - qo_len + begin + count);
      for (int64_t head = 0; head < params.num_kv_heads; ++head) {
        items.push_back({{group, head, begin, count}, count * keys});
        products += 2 * count * keys * heads_per_kv * params.head_dim;
      }
    }
  }
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost > b.cost; });
  cpu::for_each_item(parallel_for, static_cast<int64_t>(items.size()), products,
                     [&](int64_t i) { kernels.prefill_block(params, items[i].block); });
}

}  // namespace fmd

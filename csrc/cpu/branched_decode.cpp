// Cuts branched_decode into chunks of keys, one pass per shared prefix, and combines their results.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "fmd/branched_attention.h"

namespace fmd {
namespace {

// Keys per chunk. Fixed, so that results do not depend on how many threads there are; short enough that a single
// sample of 2,000 keys occupies several threads, long enough that a chunk's result is small beside its keys.
constexpr int64_t kChunkKeys = 384;

struct Work {
  std::vector<cpu::DecodeChunk> chunks;
  std::vector<cpu::DecodeCombine> combines;
  std::vector<int64_t> first_rows;  // of all combines, one after the other
  int64_t num_partial_rows = 0;
  int64_t chunk_products = 0;    // scalar multiplications of all chunks
  int64_t combine_products = 0;  // and of all combines
};

// Groups [begin, end) share their prefix.
void plan_groups(const BranchedAttentionParams& params, int64_t begin, int64_t end, int64_t kv_head, Work& work) {
  const int64_t heads_per_kv = params.num_qo_heads / params.num_kv_heads;
  const auto add_chunks = [&](int64_t group_begin, int64_t group_end, int64_t slot_begin, int64_t num_keys) {
    for (int64_t key = 0; key < num_keys; key += kChunkKeys) {
      const int64_t count = std::min(kChunkKeys, num_keys - key);
      work.chunks.push_back({group_begin, group_end, kv_head, slot_begin + key, count, work.num_partial_rows});
      const int64_t rows = (group_end - group_begin) * heads_per_kv;
      work.num_partial_rows += rows;
      work.combine_products += rows * params.head_dim;
      // Few rows cost as much as a vector full of them.
      work.chunk_products += 2 * count * std::max<int64_t>(rows, 16) * params.head_dim;
    }
  };
  const size_t prefix_chunk = work.chunks.size();
  add_chunks(begin, end, params.key_ranges[begin].prefix_start, params.key_ranges[begin].prefix_len);
  const size_t prefix_chunk_end = work.chunks.size();
  for (int64_t group = begin; group < end; ++group) {
    const size_t own_chunk = work.chunks.size();
    add_chunks(group, group + 1, params.key_ranges[group].kv_start, params.key_ranges[group].kv_len);
    const int64_t first = static_cast<int64_t>(work.first_rows.size());
    for (size_t i = prefix_chunk; i < prefix_chunk_end; ++i) {
      work.first_rows.push_back(work.chunks[i].partial_row + (group - begin) * heads_per_kv);
    }
    for (size_t i = own_chunk; i < work.chunks.size(); ++i) work.first_rows.push_back(work.chunks[i].partial_row);
    const int64_t count = static_cast<int64_t>(work.first_rows.size()) - first;
    // first_rows may still move: the offset becomes a pointer when it is complete.
    work.combines.push_back({group, kv_head, nullptr, count});
  }
}

}  // namespace

void launch_branched_decode_cpu(const BranchedAttentionParams& params, ParallelFor parallel_for) {
  const cpu::KernelTable& kernels = cpu::kernels();
  Work work;
  for (int64_t begin = 0, end = 0; begin < params.num_groups; begin = end) {
    const KeyRanges& first = params.key_ranges[begin];
    const auto shares_prefix = [&](const KeyRanges& other) {
      return first.prefix_len > 0 && other.prefix_len == first.prefix_len && other.prefix_start == first.prefix_start;
    };
    end = begin + 1;
    while (end < params.num_groups && shares_prefix(params.key_ranges[end])) ++end;
    for (int64_t head = 0; head < params.num_kv_heads; ++head) plan_groups(params, begin, end, head, work);
  }
  const int64_t* first_row = work.first_rows.data();
  for (cpu::DecodeCombine& combine : work.combines) {
    combine.first_row = first_row;
    first_row += combine.num_chunks;
  }

  float* memory = cpu::thread_scratch(cpu::ScratchUse::kLauncher, work.num_partial_rows * (params.head_dim + 2));
  const cpu::DecodePartials partials = {memory, memory + work.num_partial_rows * params.head_dim,
                                        memory + work.num_partial_rows * (params.head_dim + 1)};
  cpu::for_each_item(parallel_for, static_cast<int64_t>(work.chunks.size()), work.chunk_products,
                     [&](int64_t i) { kernels.decode_chunk(params, work.chunks[i], partials); });
  cpu::for_each_item(parallel_for, static_cast<int64_t>(work.combines.size()), work.combine_products,
                     [&](int64_t i) { kernels.decode_combine(params, work.combines[i], partials); });
}

}  // namespace fmd

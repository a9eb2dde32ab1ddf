// The CPU kernels of one instruction set. csrc/cpu/isa/ is compiled once per instruction set and fills one table each;
// the launchers of attention, beside this file, are compiled once, decide what runs where, and call through the table
// in use.
#pragma once

#include <cstdint>

#include "fmd/append.h"
#include "fmd/branched_attention.h"
#include "fmd/merge.h"

namespace fmd::cpu {

// Query rows of one kv head: queries [query_begin, query_begin + num_queries) of a group, times the heads_per_kv heads
// that share the kv head.
struct PrefillBlock {
  int64_t group;
  int64_t kv_head;
  int64_t query_begin;
  int64_t num_queries;
};

// One contiguous run of keys for the queries of adjacent groups [group_begin, group_end), which have one query each.
// Its result goes to partial rows partial_row, partial_row + 1, ...: group by group, head by head.
struct DecodeChunk {
  int64_t group_begin, group_end;
  int64_t kv_head;
  int64_t slot_begin, num_keys;
  int64_t partial_row;
};

// What the chunks of a decode step leave for the combine. Scores are in units of log2(e) * softmax_scale.
struct DecodePartials {
  float* out;          // [rows, head_dim], not yet divided by denominators
  float* maximum;      // [rows], of the scores
  float* denominator;  // [rows], sum of 2^(score - maximum)
};

// The partial rows of the query of one group over one kv head, in the order in which they are added up:
// prefix chunks, then own chunks. Row of head h of the group: first_row[i] + h.
struct DecodeCombine {
  int64_t group;
  int64_t kv_head;
  const int64_t* first_row;
  int64_t num_chunks;
};

struct KernelTable {
  const char* name;
  void (*prefill_block)(const BranchedAttentionParams& params, const PrefillBlock& block);
  void (*decode_chunk)(const BranchedAttentionParams& params, const DecodeChunk& chunk, const DecodePartials& partials);
  void (*decode_combine)(const BranchedAttentionParams& params, const DecodeCombine& combine,
                         const DecodePartials& partials);
  // Ops whose rows are independent of each other: the whole launch.
  void (*append)(const AppendParams& params, ParallelFor parallel_for);
  void (*rope_append)(const RopeAppendParams& params, ParallelFor parallel_for);
  void (*merge)(const MergeParams& params, ParallelFor parallel_for);
};

// The table in use.
const KernelTable& kernels();

enum class ScratchUse { kWorker, kLauncher };

// At least num_floats floats, 64-byte aligned and uninitialised, of this thread; valid until its next call for the
// same use. Kept between calls: a fresh mapping per call would cost more in page faults than a decode step.
float* thread_scratch(ScratchUse use, int64_t num_floats);

}  // namespace fmd::cpu

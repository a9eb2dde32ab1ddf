// The planner: modality labels of a batch -> rows, segments, merge pairs. Host only, no state, no torch.
#pragma once

#include <cstdint>
#include <vector>

namespace fmd {

// A joint position mixes visual and audio features in one embedding, with one modality or the other masked before they
// were mixed: it is in both branches.
enum class Modality : int8_t { kPadding = -1, kText = 0, kVisual = 1, kAudio = 2, kJoint = 3 };
enum class Masking : int32_t { kZero = 0, kAttention = 1 };

// How far a sample is on its way into the fork. A sample that never forks keeps all its keys in the prefix segment.
enum class Phase : int8_t {
  kUnforked = 0,    // at most one branch modality: the vanilla computation
  kPrefixOpen = 1,  // will fork, but no position with a branch modality has come yet
  kForked = 2,
};

constexpr int kNumSegments = 3;  // prefix, visual branch, audio branch
constexpr int kPrefixSegment = 0;

// The rows and query groups of one attention call, before slots are known.
// Group g is the queries of segment group_segment[g] (= sample * kNumSegments + segment; with one segment per sample,
// just the sample), and rows qo_rows[cu_seqlens_q[g] .. cu_seqlens_q[g + 1]) in causal order. Empty groups are left
// out.
struct RowGroups {
  std::vector<int64_t> qo_rows;
  std::vector<int64_t> cu_seqlens_q;
  std::vector<int64_t> group_segment;
  std::vector<int64_t> row_segment;  // [rows]: the segment that row's key is appended to
  std::vector<int64_t> row_offset;   // [rows]: its place in that segment, counted from the segment's start
  int64_t max_qo_len = 0;
};

struct Plan {
  int64_t num_home = 0;                // home rows are rows 0 .. num_home-1, away rows follow
  std::vector<int64_t> positions;      // [rows]: index into the labels, sample * length + position
  std::vector<int64_t> home_rows;      // [away rows]: the home row that away row num_home + j merges into
  std::vector<int64_t> away_modality;  // [away rows]: Modality of that position
  RowGroups fork;                      // layers before the merge: kNumSegments segments per sample
  RowGroups trunk;                     // layers after it: one segment per sample
  std::vector<int64_t> seg_len;        // [batch * kNumSegments]: lengths after this call
  std::vector<int8_t> phase;           // [batch]: phases after this call
};

// Plans one forward call of a padded batch. labels [batch, length]: a Modality each, padding anywhere. Before this
// call: seg_len [batch, kNumSegments] keys per segment in the fork layers, trunk_len [batch] keys in the layers after
// the merge, phase [batch]. The caller moves a sample from kUnforked to kPrefixOpen when it knows that both branch
// modalities will occur; the planner moves it on to kForked at the first position with a branch modality.
// Throws std::invalid_argument for an unknown label or phase, a negative length, or a joint position with
// Masking::kAttention: there is no position that a branch could do without.
Plan make_plan(const int8_t* labels, int64_t batch, int64_t length, const int64_t* seg_len, const int64_t* trunk_len,
               const int8_t* phase, Masking masking);

}  // namespace fmd

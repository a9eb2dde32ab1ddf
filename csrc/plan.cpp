#include "fmd/plan.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>

namespace fmd {
namespace {

// Branch segments are numbered like their modality. Text and joint positions live in the first branch.
int home_segment_of(Modality modality) { return modality == Modality::kAudio ? 2 : 1; }

int64_t count_home_rows(const int8_t* labels, int64_t batch, int64_t length, Masking masking) {
  int64_t count = 0;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = b * length; i < (b + 1) * length; ++i) {
      const auto refuse = [&](const char* why) {
        throw std::invalid_argument("labels[" + std::to_string(b) + ", " + std::to_string(i - b * length) + "] is " +
                                    std::to_string(labels[i]) + "; " + why);
      };
      if (labels[i] < static_cast<int8_t>(Modality::kPadding) || labels[i] > static_cast<int8_t>(Modality::kJoint)) {
        refuse("a label is -1 (padding), 0 (text), 1 (visual), 2 (audio) or 3 (joint)");
      }
      if (labels[i] == static_cast<int8_t>(Modality::kJoint) && masking == Masking::kAttention) {
        refuse(
            "a joint position mixes both modalities, so masking='attention' has no position to leave out of a branch; "
            "accepted with joint positions is masking='zero'");
      }
      count += labels[i] != static_cast<int8_t>(Modality::kPadding);
    }
  }
  return count;
}

void check_state(int64_t batch, const int64_t* seg_len, const int64_t* trunk_len, const int8_t* phase) {
  for (int64_t b = 0; b < batch; ++b) {
    if (phase[b] < static_cast<int8_t>(Phase::kUnforked) || phase[b] > static_cast<int8_t>(Phase::kForked)) {
      throw std::invalid_argument("phase[" + std::to_string(b) + "] is " + std::to_string(phase[b]) +
                                  "; a phase is 0 (unforked), 1 (prefix open) or 2 (forked)");
    }
    for (int64_t s = 0; s < kNumSegments; ++s) {
      if (seg_len[b * kNumSegments + s] < 0) {
        throw std::invalid_argument("seg_len[" + std::to_string(b) + ", " + std::to_string(s) + "] is " +
                                    std::to_string(seg_len[b * kNumSegments + s]) + "; a length is at least 0");
      }
    }
    if (trunk_len[b] < 0) {
      throw std::invalid_argument("trunk_len[" + std::to_string(b) + "] is " + std::to_string(trunk_len[b]) +
                                  "; a length is at least 0");
    }
  }
}

// Ends the group that has been growing at the end of qo_rows. A group without rows is left out.
void close_group(RowGroups& groups, int64_t segment) {
  const int64_t qo_len = static_cast<int64_t>(groups.qo_rows.size()) - groups.cu_seqlens_q.back();
  if (qo_len == 0) return;
  groups.cu_seqlens_q.push_back(static_cast<int64_t>(groups.qo_rows.size()));
  groups.group_segment.push_back(segment);
  groups.max_qo_len = std::max(groups.max_qo_len, qo_len);
}

}  // namespace

Plan make_plan(const int8_t* labels, int64_t batch, int64_t length, const int64_t* seg_len, const int64_t* trunk_len,
               const int8_t* phase, Masking masking) {
  check_state(batch, seg_len, trunk_len, phase);

  Plan plan;
  plan.num_home = count_home_rows(labels, batch, length, masking);
  const size_t num_home = static_cast<size_t>(plan.num_home);
  plan.seg_len.assign(seg_len, seg_len + batch * kNumSegments);
  plan.phase.assign(phase, phase + batch);
  // Home rows are written by index, away rows are pushed behind them: their numbers are known as they come.
  plan.positions.resize(num_home);
  RowGroups& fork = plan.fork;
  fork.row_segment.resize(num_home);
  fork.row_offset.resize(num_home);
  fork.cu_seqlens_q.push_back(0);
  RowGroups& trunk = plan.trunk;
  trunk.qo_rows.resize(num_home);
  trunk.row_segment.resize(num_home);
  trunk.row_offset.resize(num_home);
  trunk.cu_seqlens_q.push_back(0);

  std::array<std::vector<int64_t>, kNumSegments> rows_of_segment;  // of the current sample
  int64_t home = 0;
  for (int64_t b = 0; b < batch; ++b) {
    Phase now = static_cast<Phase>(phase[b]);
    int64_t* lengths = plan.seg_len.data() + b * kNumSegments;
    const int64_t first_home = home;
    const auto place = [&](int64_t row, int segment) {
      fork.row_segment[row] = b * kNumSegments + segment;
      fork.row_offset[row] = lengths[segment]++;
      rows_of_segment[segment].push_back(row);
    };

    for (int64_t i = b * length; i < (b + 1) * length; ++i) {
      const Modality modality = static_cast<Modality>(labels[i]);
      if (modality == Modality::kPadding) continue;
      const bool is_text = modality == Modality::kText;
      if (now == Phase::kPrefixOpen && !is_text) now = Phase::kForked;
      const int segment = now == Phase::kForked ? home_segment_of(modality) : kPrefixSegment;
      plan.positions[home] = i;
      place(home, segment);
      // Attention masking drops the audio-visual positions of the other branch, zero masking keeps them there.
      if (now == Phase::kForked && (is_text || masking == Masking::kZero)) {
        const int64_t away = static_cast<int64_t>(plan.positions.size());
        plan.positions.push_back(i);
        plan.home_rows.push_back(home);
        plan.away_modality.push_back(static_cast<int64_t>(modality));
        fork.row_segment.push_back(0);
        fork.row_offset.push_back(0);
        place(away, kNumSegments - segment);
      }
      ++home;
    }

    for (int s = 0; s < kNumSegments; ++s) {
      fork.qo_rows.insert(fork.qo_rows.end(), rows_of_segment[s].begin(), rows_of_segment[s].end());
      rows_of_segment[s].clear();
      close_group(fork, b * kNumSegments + s);
    }
    plan.phase[b] = static_cast<int8_t>(now);

    for (int64_t row = first_home; row < home; ++row) {
      trunk.qo_rows[row] = row;
      trunk.row_segment[row] = b;
      trunk.row_offset[row] = trunk_len[b] + row - first_home;
    }
    if (home > first_home) {
      trunk.cu_seqlens_q.push_back(home);
      trunk.group_segment.push_back(b);
      trunk.max_qo_len = std::max(trunk.max_qo_len, home - first_home);
    }
  }
  return plan;
}

}  // namespace fmd

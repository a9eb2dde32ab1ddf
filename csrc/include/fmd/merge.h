#pragma once

#include <cstdint>

#include "fmd/types.h"

namespace fmd {

// hidden[home_rows[j]] = weights[j] * hidden[home_rows[j]] + (1 - weights[j]) * hidden[away_rows[j]], in place.
struct MergeParams {
  DType dtype;
  int64_t num_rows, hidden_size, num_pairs;
  void* hidden;  // [num_rows, hidden_size]
  int64_t stride_row;
  const int64_t* home_rows;  // [num_pairs], each row at most once
  const int64_t* away_rows;  // [num_pairs], disjoint from home_rows
  const float* weights;      // [num_pairs]
};

void launch_merge_cuda(const MergeParams& params, void* stream);

}  // namespace fmd

// How threads lie over rows of many equal items: a thread keeps one place of a row, its column, and takes that place of
// several rows, so that it finds out where it is once.
#pragma once

#include <algorithm>

#include "cuda/dispatch.h"

namespace fmd::cuda {

constexpr int kRowThreads = 256;  // of a block, at most

struct RowThreads {
  int columns;        // of a row, in all
  int block_columns;  // that a block takes
  int block_rows;     // that a block takes at once
  int column_blocks;

  RowThreads(int64_t columns_of_row, int64_t num_rows) {
    columns = static_cast<int>(columns_of_row);
    block_columns = std::min(columns, kRowThreads);
    block_rows = static_cast<int>(std::min<int64_t>(kRowThreads / block_columns, num_rows));
    column_blocks = static_cast<int>(ceil_div(columns, block_columns));
  }

  int threads() const { return static_cast<int>(ceil_div(block_columns * block_rows, kWarpSize)) * kWarpSize; }
  // rows_per_thread: how many times block_rows a block takes.
  int64_t blocks(int64_t num_rows, int rows_per_thread) const {
    return ceil_div(num_rows, block_rows * rows_per_thread) * column_blocks;
  }

  // This thread's column, and its first row; `columns` or more for a thread that has none.
  FMD_DEVICE int column() const {
    if (thread_index() >= block_columns * block_rows) return columns;
    const int block = static_cast<int>(block_index()) % column_blocks;
    return block * block_columns + thread_index() % block_columns;
  }
  FMD_DEVICE int64_t first_row(int rows_per_thread) const {
    const int block = static_cast<int>(block_index()) / column_blocks;
    return static_cast<int64_t>(block) * block_rows * rows_per_thread + thread_index() / block_columns;
  }
};

}  // namespace fmd::cuda

// Rows of K and V into their slots: bytes only, so any head_dim and dtype. A thread moves the same vector of kRows rows
// and reads all of them, and their slots, before it writes the first.
#include "cuda/append.h"
#include "cuda/row_threads.h"

namespace fmd::cuda {
namespace {

constexpr int kRows = 4;

}  // namespace

// Unit: what is moved at a time; all strides and pointers are multiples of it. Params' strides are in elements.
template <typename Unit>
FMD_KERNEL(kRowThreads, 1)
wide_append_kernel(const AppendParams params, const RowThreads threads, const int element_bytes) {
  const int column = threads.column();
  if (column >= threads.columns) return;
  const int units = static_cast<int>(params.head_dim) * element_bytes / static_cast<int>(sizeof(Unit));
  const int unit = column % units;
  int head = column / units;
  const bool is_v = head >= params.num_kv_heads;
  if (is_v) head -= static_cast<int>(params.num_kv_heads);
  const int64_t from_head = is_v ? params.v_stride_head : params.k_stride_head;
  const int64_t from_row = is_v ? params.v_stride_row : params.k_stride_row;
  const int64_t to_head = is_v ? params.v_pool_stride_head : params.k_pool_stride_head;
  const int64_t to_slot = is_v ? params.v_pool_stride_slot : params.k_pool_stride_slot;
  const auto unit_at = [&](auto* base, int64_t offset) { return base + offset * element_bytes + unit * sizeof(Unit); };
  const char* from = unit_at(static_cast<const char*>(is_v ? params.v : params.k), head * from_head);
  char* to = unit_at(static_cast<char*>(is_v ? params.v_pool : params.k_pool), head * to_head);

  const int64_t first = threads.first_row(kRows);
  int64_t slots[kRows];
  Unit moved[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int64_t row = first + i * threads.block_rows;
    if (row >= params.num_rows) continue;
    slots[i] = params.slots[row];
    moved[i] = *reinterpret_cast<const Unit*>(from + row * from_row * element_bytes);
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (first + i * threads.block_rows >= params.num_rows) continue;
    *reinterpret_cast<Unit*>(to + slots[i] * to_slot * element_bytes) = moved[i];
  }
}

void launch_wide_append(const AppendParams& params, void* stream) {
  const int element_bytes = static_cast<int>(bytes_of(params.dtype));
  const auto run = [&](auto kernel, int64_t unit_bytes) {
    const RowThreads threads(2 * params.num_kv_heads * params.head_dim * element_bytes / unit_bytes, params.num_rows);
    launch("append_", kernel, threads.blocks(params.num_rows, kRows), threads.threads(), 0, stream, params, threads,
           element_bytes);
  };
  const bool vectors = begins_aligned(params) && params.head_dim * element_bytes % 16 == 0;
  if (vectors) return run(wide_append_kernel<Vec16>, 16);
  params.dtype == DType::kFloat32 ? run(wide_append_kernel<uint32_t>, 4) : run(wide_append_kernel<uint16_t>, 2);
}

}  // namespace fmd::cuda

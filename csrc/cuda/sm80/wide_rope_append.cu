// append with rotary position embedding: of q into q_out, of k on its way into the pool; v is copied.
//
// A thread has one vector of half a head, and the one half a head further on, of kHeads heads of a row: it reads all of
// them before it writes the first, and the angles, which all heads share, once.
#include "cuda/append.h"
#include "cuda/rope_vectors.cuh"
#include "cuda/row_threads.h"

namespace fmd::cuda {
namespace {

constexpr int kHeads = 4;

}  // namespace

// kElements: of a 16-byte vector, or 1 where something is not aligned for that. Thread groups take heads in turn:
// group g has heads g, g + head_groups, ...
template <typename T, int kElements>
FMD_KERNEL(kRowThreads, 1)
wide_rope_append_kernel(const RopeAppendParams params, const RowThreads threads, const int head_groups) {
  using Vec = RopeVec<T, kElements>;
  const AppendParams& append = params.append;
  const int column = threads.column();
  const int64_t row = threads.first_row(1);
  if (column >= threads.columns || row >= append.num_rows) return;
  const int half = static_cast<int>(append.head_dim / 2), half_vecs = half / kElements;
  const int first_v = static_cast<int>(params.num_qo_heads + append.num_kv_heads);
  const int num_heads = first_v + static_cast<int>(append.num_kv_heads);
  const int first_head = column / half_vecs;
  const int low = column % half_vecs * kElements;  // element of the head; the other is low + half
  const int64_t slot = append.slots[row];

  const auto from = [&](int head) {
    if (head < params.num_qo_heads) {
      return static_cast<const T*>(params.q) + row * params.q_stride_row + head * params.q_stride_head;
    }
    return head < first_v
               ? static_cast<const T*>(append.k) + row * append.k_stride_row +
                     (head - params.num_qo_heads) * append.k_stride_head
               : static_cast<const T*>(append.v) + row * append.v_stride_row + (head - first_v) * append.v_stride_head;
  };
  const auto to = [&](int head) {
    if (head < params.num_qo_heads) {
      return static_cast<T*>(params.q_out) + row * params.q_out_stride_row + head * params.q_out_stride_head;
    }
    return head < first_v ? static_cast<T*>(append.k_pool) + slot * append.k_pool_stride_slot +
                                (head - params.num_qo_heads) * append.k_pool_stride_head
                          : static_cast<T*>(append.v_pool) + slot * append.v_pool_stride_slot +
                                (head - first_v) * append.v_pool_stride_head;
  };

  Vec a[kHeads], b[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = first_head + i * head_groups;
    if (head >= num_heads) continue;
    a[i] = *reinterpret_cast<const Vec*>(from(head) + low);
    b[i] = *reinterpret_cast<const Vec*>(from(head) + low + half);
  }
  float cos_a[kElements], cos_b[kElements], sin_a[kElements], sin_b[kElements];
  const int64_t cos_at = row * params.cos_stride_row + low, sin_at = row * params.sin_stride_row + low;
  read_angles<T>(params, params.cos, cos_at, cos_a);
  read_angles<T>(params, params.cos, cos_at + half, cos_b);
  read_angles<T>(params, params.sin, sin_at, sin_a);
  read_angles<T>(params, params.sin, sin_at + half, sin_b);
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const int head = first_head + i * head_groups;
    if (head >= num_heads) continue;
    if (head < first_v) {
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        const float x = to_float(a[i].element[j]), y = to_float(b[i].element[j]);
        a[i].element[j] = from_float<T>(x * cos_a[j] - y * sin_a[j]);
        b[i].element[j] = from_float<T>(y * cos_b[j] + x * sin_b[j]);
      }
    }
    *reinterpret_cast<Vec*>(to(head) + low) = a[i];
    *reinterpret_cast<Vec*>(to(head) + low + half) = b[i];
  }
}

void launch_wide_rope_append(const RopeAppendParams& params, void* stream) {
  const AppendParams& append = params.append;
  const bool vectors = begins_aligned(params);
  const int64_t head_groups = ceil_div(params.num_qo_heads + 2 * append.num_kv_heads, kHeads);
  dispatch_float(append.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kElements = 16 / sizeof(T);
    const auto kernel = vectors ? wide_rope_append_kernel<T, kElements> : wide_rope_append_kernel<T, 1>;
    const int64_t half_vecs = append.head_dim / 2 / (vectors ? kElements : 1);
    const RowThreads threads(head_groups * half_vecs, append.num_rows);
    launch("rope_append_", kernel, threads.blocks(append.num_rows, 1), threads.threads(), 0, stream, params, threads,
           static_cast<int>(head_groups));
  });
}

}  // namespace fmd::cuda

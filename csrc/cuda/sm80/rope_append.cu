// append with rotary position embedding: of q into q_out, of k on its way into the pool; v is copied.
//
// A row has an item for each vector of half a head: of every query head and key head to rotate, of every value head
// to copy. A thread per item, with both halves of what it rotates.
#include "cuda/append.h"
#include "cuda/rope_vectors.cuh"

namespace fmd::cuda {

constexpr int kRopeThreads = 256;

// kElements: of a 16-byte vector, or 1 where something is not aligned for that.
template <typename T, int kElements>
FMD_KERNEL(kRopeThreads, 1)
rope_append_kernel(const RopeAppendParams params) {
  using Vec = RopeVec<T, kElements>;
  const AppendParams& append = params.append;
  const int64_t half = append.head_dim / 2, half_vecs = half / kElements;
  const int64_t num_heads = params.num_qo_heads + 2 * append.num_kv_heads;
  const int64_t item = block_index() * kRopeThreads + thread_index();
  const int64_t row = item / (num_heads * half_vecs);
  if (row >= append.num_rows) return;
  int64_t head = item / half_vecs % num_heads;
  const int64_t low = item % half_vecs * kElements;  // element of the head; the other is low + half

  const T* from;
  T* to;
  const bool is_q = head < params.num_qo_heads;
  const bool is_v = head >= params.num_qo_heads + append.num_kv_heads;
  if (is_q) {
    from = static_cast<const T*>(params.q) + row * params.q_stride_row + head * params.q_stride_head;
    to = static_cast<T*>(params.q_out) + row * params.q_out_stride_row + head * params.q_out_stride_head;
  } else {
    head = (head - params.num_qo_heads) % append.num_kv_heads;
    const int64_t slot = append.slots[row];
    from = is_v ? static_cast<const T*>(append.v) + row * append.v_stride_row + head * append.v_stride_head
                : static_cast<const T*>(append.k) + row * append.k_stride_row + head * append.k_stride_head;
    to = is_v ? static_cast<T*>(append.v_pool) + head * append.v_pool_stride_head + slot * append.v_pool_stride_slot
              : static_cast<T*>(append.k_pool) + head * append.k_pool_stride_head + slot * append.k_pool_stride_slot;
  }
  Vec a = *reinterpret_cast<const Vec*>(from + low);
  Vec b = *reinterpret_cast<const Vec*>(from + low + half);
  if (!is_v) {
    const int64_t cos_at = row * params.cos_stride_row + low, sin_at = row * params.sin_stride_row + low;
    float cos_a[kElements], cos_b[kElements], sin_a[kElements], sin_b[kElements];
    read_angles<T>(params, params.cos, cos_at, cos_a);
    read_angles<T>(params, params.cos, cos_at + half, cos_b);
    read_angles<T>(params, params.sin, sin_at, sin_a);
    read_angles<T>(params, params.sin, sin_at + half, sin_b);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float x = to_float(a.element[i]), y = to_float(b.element[i]);
      a.element[i] = from_float<T>(x * cos_a[i] - y * sin_a[i]);
      b.element[i] = from_float<T>(y * cos_b[i] + x * sin_b[i]);
    }
  }
  *reinterpret_cast<Vec*>(to + low) = a;
  *reinterpret_cast<Vec*>(to + low + half) = b;
}

void launch_narrow_rope_append(const RopeAppendParams& params, void* stream) {
  const AppendParams& append = params.append;
  const bool vectors = begins_aligned(params);
  dispatch_float(append.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kElements = 16 / sizeof(T);
    const auto kernel = vectors ? rope_append_kernel<T, kElements> : rope_append_kernel<T, 1>;
    const int64_t half_vecs = append.head_dim / 2 / (vectors ? kElements : 1);
    const int64_t items = append.num_rows * (params.num_qo_heads + 2 * append.num_kv_heads) * half_vecs;
    launch("rope_append_", kernel, ceil_div(items, kRopeThreads), kRopeThreads, 0, stream, params);
  });
}

}  // namespace fmd::cuda

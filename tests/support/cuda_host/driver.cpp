// Runs CUDA launchers and kernels on the CPU (see intrinsics.h) for tests/csrc/test_cuda_host.py: reads calls from
// stdin, writes what they leave behind to stdout.
//
// A call is numbers (int64) and arrays (an int64 number of bytes, then the bytes), in the order of the code below.
// Every array gets an allocation of exactly its size, so that AddressSanitizer sees each access outside it.
#include "cuda_host/driver.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>

#include "cuda/device/intrinsics.h"
#include "fmd/append.h"
#include "fmd/branched_attention.h"
#include "fmd/library.h"
#include "fmd/merge.h"

using namespace driver;

namespace {

// The heads of a pool moved `distance` bytes apart, in memory of which only the touched pages exist.
class FarHeads {
 public:
  FarHeads(const void* heads, int64_t head_bytes, int64_t num_heads, int64_t distance)
      : bytes_(static_cast<size_t>(distance * (num_heads - 1) + head_bytes)) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (data_ == MAP_FAILED) throw std::runtime_error("driver: no address space");
    for (int64_t i = 0; i < num_heads; ++i) {
      std::memcpy(static_cast<char*>(data_) + i * distance, static_cast<const char*>(heads) + i * head_bytes,
                  head_bytes);
    }
  }
  ~FarHeads() { munmap(data_, bytes_); }
  FarHeads(const FarHeads&) = delete;
  FarHeads& operator=(const FarHeads&) = delete;
  void* data() const { return data_; }
  void copy_back(void* heads, int64_t head_bytes, int64_t num_heads, int64_t distance) const {
    for (int64_t i = 0; i < num_heads; ++i) {
      std::memcpy(static_cast<char*>(heads) + i * head_bytes, static_cast<const char*>(data_) + i * distance,
                  head_bytes);
    }
  }

 private:
  size_t bytes_;
  void* data_;
};

// Makes an op run the kernel whose name comes next.
void select(const char* op) {
  const Array letters = Array::read();
  const std::string name(letters.at<const char>(), static_cast<size_t>(letters.bytes()));
  if (const char* reason = fmd_ext_select_cuda_kernel(op, name.c_str())) throw std::runtime_error(reason);
}

void attention(bool decode) {
  fmd::BranchedAttentionParams p{};
  p.dtype = static_cast<fmd::DType>(number());
  p.num_rows = number();
  p.num_slots = number();
  p.num_qo_heads = number();
  p.num_kv_heads = number();
  p.head_dim = number();
  p.num_groups = number();
  p.num_queries = number();
  p.max_qo_len = number();
  p.softmax_scale = real();
  const Array q = Array::read();
  p.q = q.at<void>(number());
  p.q_stride_row = number();
  p.q_stride_head = number();
  const Array k = Array::read();
  p.k = k.at<void>(number());
  p.k_stride_head = number();
  p.k_stride_slot = number();
  const Array v = Array::read();
  p.v = v.at<void>(number());
  p.v_stride_head = number();
  p.v_stride_slot = number();
  const Array qo_rows = Array::read(), cu_seqlens_q = Array::read(), key_ranges = Array::read();
  p.qo_rows = qo_rows.at<int64_t>();
  p.cu_seqlens_q = decode ? nullptr : cu_seqlens_q.at<int64_t>();
  p.key_ranges = key_ranges.at<fmd::KeyRanges>();
  const Array out = Array::read(), lse = Array::read();  // what they hold before the call
  p.out = out.at<void>();
  p.out_stride_row = p.num_qo_heads * p.head_dim;
  p.out_stride_head = p.head_dim;
  p.lse = number() != 0 ? lse.at<float>() : nullptr;
  std::unique_ptr<FarHeads> far_k, far_v;
  if (const int64_t distance = number(); distance > 0) {  // in elements of 2 bytes; k and v are contiguous then
    const int64_t head_bytes = p.num_slots * p.head_dim * 2;
    far_k = std::make_unique<FarHeads>(p.k, head_bytes, p.num_kv_heads, distance * 2);
    far_v = std::make_unique<FarHeads>(p.v, head_bytes, p.num_kv_heads, distance * 2);
    p.k = far_k->data();
    p.v = far_v->data();
    p.k_stride_head = p.v_stride_head = distance;
  }
  select(decode ? "branched_decode" : "branched_prefill");
  fmd::cuda::host::settings().compute_capability = static_cast<int>(number());
  const bool fixed_split = number() != 0;
  if (decode) {
    const int64_t bytes = fmd::branched_decode_workspace_cuda(p, fixed_split);
    const Array workspace(bytes);
    std::memset(workspace.at<void>(), 0xff, static_cast<size_t>(bytes));
    fmd::launch_branched_decode_cuda(p, fixed_split, workspace.at<void>(), nullptr);
  } else {
    const int64_t bytes = fmd::branched_prefill_workspace_cuda(p);
    const Array workspace(bytes);
    std::memset(workspace.at<void>(), 0x7f, static_cast<size_t>(bytes));
    fmd::launch_branched_prefill_cuda(p, workspace.at<void>(), nullptr);
  }
  out.write();
  lse.write();
}

void append(bool rope) {
  select(rope ? "rope_append_" : "append_");
  fmd::RopeAppendParams r{};
  fmd::AppendParams& p = r.append;
  p.dtype = static_cast<fmd::DType>(number());
  p.num_rows = number();
  p.num_slots = number();
  p.num_kv_heads = number();
  p.head_dim = number();
  const Array k_pool = Array::read();
  p.k_pool = k_pool.at<void>(number());
  p.k_pool_stride_head = number();
  p.k_pool_stride_slot = number();
  const Array v_pool = Array::read();
  p.v_pool = v_pool.at<void>(number());
  p.v_pool_stride_head = number();
  p.v_pool_stride_slot = number();
  const Array k = Array::read();
  p.k = k.at<void>(number());
  p.k_stride_row = number();
  p.k_stride_head = number();
  const Array v = Array::read();
  p.v = v.at<void>(number());
  p.v_stride_row = number();
  p.v_stride_head = number();
  const Array slots = Array::read();
  p.slots = slots.at<int64_t>();
  const int64_t distance = number();  // of the pools' heads, in elements; 0: as they are
  const int64_t bytes = fmd::bytes_of(p.dtype), head_bytes = p.num_slots * p.head_dim * bytes;
  std::unique_ptr<FarHeads> far_k, far_v;
  if (distance > 0) {
    far_k = std::make_unique<FarHeads>(p.k_pool, head_bytes, p.num_kv_heads, distance * bytes);
    far_v = std::make_unique<FarHeads>(p.v_pool, head_bytes, p.num_kv_heads, distance * bytes);
    p.k_pool = far_k->data();
    p.v_pool = far_v->data();
    p.k_pool_stride_head = p.v_pool_stride_head = distance;
  }
  if (rope) {
    r.num_qo_heads = number();
    r.angle_dtype = static_cast<fmd::DType>(number());
    const Array q = Array::read();
    r.q = q.at<void>(number());
    r.q_stride_row = number();
    r.q_stride_head = number();
    const Array q_out = Array::read();
    r.q_out = q_out.at<void>(number());
    r.q_out_stride_row = number();
    r.q_out_stride_head = number();
    const Array cos = Array::read();
    r.cos = cos.at<void>(number());
    r.cos_stride_row = number();
    const Array sin = Array::read();
    r.sin = sin.at<void>(number());
    r.sin_stride_row = number();
    fmd::launch_rope_append_cuda(r, nullptr);
    q_out.write();
  } else {
    fmd::launch_append_cuda(p, nullptr);
  }
  if (distance > 0) {
    far_k->copy_back(k_pool.at<void>(), head_bytes, p.num_kv_heads, distance * bytes);
    far_v->copy_back(v_pool.at<void>(), head_bytes, p.num_kv_heads, distance * bytes);
  }
  k_pool.write();
  v_pool.write();
}

void merge() {
  fmd::MergeParams p{};
  p.dtype = static_cast<fmd::DType>(number());
  p.num_rows = number();
  p.hidden_size = number();
  p.num_pairs = number();
  const Array hidden = Array::read();
  p.hidden = hidden.at<void>(number());
  p.stride_row = number();
  const Array home_rows = Array::read(), away_rows = Array::read(), weights = Array::read();
  p.home_rows = home_rows.at<int64_t>();
  p.away_rows = away_rows.at<int64_t>();
  p.weights = weights.at<float>();
  fmd::launch_merge_cuda(p, nullptr);
  hidden.write();
}

}  // namespace

int main() try {
  for (;;) {
    const int64_t call = number();
    if (call < 0) return 0;
    fmd::cuda::host::settings().seed = static_cast<uint64_t>(number());
    fmd::cuda::host::settings().multiprocessors = static_cast<int>(number());
    switch (call) {
      case 0:
        attention(false);
        break;
      case 1:
        attention(true);
        break;
      case 2:
        append(false);
        break;
      case 3:
        merge();
        break;
      case 4:
        faulty(number());
        break;
      case 5:
        append(true);
        break;
      case 6:
        faulty_sm90(number());
        break;
      case 7:
        fragments(number());
        break;
      case 8:
        faulty_grids(number());
        break;
      default:
        throw std::runtime_error("driver: unknown call");
    }
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}

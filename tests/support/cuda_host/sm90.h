// sm_90a's operations on the CPU, for tests. See csrc/cuda/device/sm90.h for what each
// name means, and intrinsics.h for how strict this is.
//
// - What an asynchronous copy brought counts for wgmma only after an async_proxy_fence(), of the reading warp or of the
//   copying thread; until then wgmma reads NaN. Not so for plain stores: a fence that they lack is not found.
// - copy_async_arrive() arrives some time later, when the copies are there: in one order of four as late as can be.
// - A wgmma leaves NaN in d until the wait that is for it. With an odd seed it reads its operands as late as that (they
//   may have been overwritten), else at once (they may not be there yet).
// - A wgmma without a fence after the last wait, an mbarrier that was not initialised or gets too many arrivals, a
//   descriptor that points outside shared memory, and a block in which all wait are errors.
#pragma once

#include <type_traits>

#include "cuda/device/sm90.h"

namespace fmd::cuda {

namespace host {

struct WgmmaOperands {
  float* d;                 // [n / 2]
  const uint32_t* a_words;  // [4], or null: a is a descriptor
  uint64_t a, b;
  int n;
  bool accumulate, is_bfloat16, fenced;
  int64_t proxy_fenced_at;
};
void wgmma_issue(Operands operands);
void wgmma_commit(Operands operands);
void wgmma_wait(Operands operands);  // int: groups that may be under way

void mbarrier_init(uint64_t* barrier, int arrivals);
void mbarrier_arrive(uint64_t* barrier);
bool mbarrier_phase_is_over(const uint64_t* barrier, int parity);

}  // namespace host

inline void async_proxy_fence() {
  host::deliver(host::current_thread());
  host::current_thread().proxy_fenced_at = host::tick();
}

inline void group_barrier(int id, int threads) { host::wait_at_group_barrier(id, threads); }
inline void group_barrier_arrive(int id, int threads) { host::arrive_at_group_barrier(id, threads); }

inline void mbarrier_init(uint64_t* barrier, int arrivals) { host::mbarrier_init(barrier, arrivals); }
inline void mbarrier_arrive(uint64_t* barrier) { host::mbarrier_arrive(barrier); }
inline void copy_async_arrive(uint64_t* barrier) { host::track_copies(barrier, host::mbarrier_arrive); }
inline void mbarrier_wait(uint64_t* barrier, int parity) {
  host::wait_at_mbarrier(barrier, parity, host::mbarrier_phase_is_over);
}

template <int kRegisters>
void setmaxnreg_dec() {}
template <int kRegisters>
void setmaxnreg_inc() {}

template <typename T, int kCount>
void wgmma_fence_operand(T (&)[kCount]) {}
inline void wgmma_fence() { host::current_thread().wgmma_fenced = true; }

template <typename T, int kN>
void wgmma_shared(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  constexpr bool is_bfloat16 = std::is_same_v<T, BFloat16>;
  const host::Thread& thread = host::current_thread();
  host::WgmmaOperands operands{
      d, nullptr, a, b, kN, accumulate, is_bfloat16, thread.wgmma_fenced, thread.proxy_fenced_at};
  host::meet(host::wgmma_issue, &operands);
}
template <typename T, int kN>
void wgmma_registers(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b) {
  constexpr bool is_bfloat16 = std::is_same_v<T, BFloat16>;
  const host::Thread& thread = host::current_thread();
  host::WgmmaOperands operands{d, a, 0, b, kN, true, is_bfloat16, thread.wgmma_fenced, thread.proxy_fenced_at};
  host::meet(host::wgmma_issue, &operands);
}

inline void wgmma_commit() { host::meet(host::wgmma_commit, nullptr); }
template <int kPendingGroups>
void wgmma_wait() {
  int pending = kPendingGroups;
  host::meet(host::wgmma_wait, &pending);
  host::current_thread().wgmma_fenced = false;
}

}  // namespace fmd::cuda

// The device operations of sm_90a, beside those of intrinsics.h and with two implementations like them.
//
// - async_proxy_fence(): wgmma and what else uses the asynchronous proxy see, from here on, what was written to shared
//   memory before by stores and by copy_async_16: wgmma of this thread what it knows to be written (it has waited for
//   it), and wgmma of the threads that it synchronises with afterwards what it has written itself.
// - group_barrier(id, threads): of the threads that name the same id, 1 to 15.
// - group_barrier_arrive(id, threads): counts as one of these threads, and does not wait.
// - copy_async_arrive(barrier): arrives for this thread once all copies that it has issued are there. Who waits for
//   that phase may read them; before wgmma reads them, who waited needs an async_proxy_fence().
// - mbarrier_init(barrier, arrivals), mbarrier_arrive(barrier), mbarrier_wait(barrier, parity): a phase ends with its
//   last arrival; the wait is for the end of the phase of that parity, the first phase being of parity 0. Waiting is
//   for whole warps.
// - setmaxnreg_dec<N>(), setmaxnreg_inc<N>(): registers per thread that the warpgroup has from there on.
// - wgmma_fence_operand(registers): the compiler moves no use of these registers across it. Needed before wgmma_fence()
//   for the operands of the wgmma that follows, and after wgmma_wait() for its results: the compiler does not know that
//   a wgmma runs asynchronously.
// - wgmma_fence(): before the first wgmma after its registers were touched.
// - wgmma_shared<T, N>(d, a, b, accumulate): d (+)= a b; wgmma_registers<T, N>(d, a, b): d += a b. m64nNk16, fp32 sums.
//   a: descriptor of [64 rows, 16] with the 16 contiguous, or four registers. b: descriptor, for wgmma_shared of
//   [N, 16] with the 16 contiguous, for wgmma_registers of [16, N] with the N contiguous. Of whole warpgroups. Neither
//   d nor a register of a may be touched, and no memory be overwritten, until the wait is over.
// - wgmma_commit(), wgmma_wait<N>(): waits for all but the newest N groups.
#pragma once

#include "cuda/device/intrinsics.h"

namespace fmd::cuda {

constexpr int kWarpgroupSize = 128;

// Elements of a 128-byte row, and bytes of eight of them: the unit in which swizzled tiles repeat.
constexpr int kPanelDims = 64;
constexpr int kAtomBytes = 1024;

// Descriptor of a matrix in tiles of 128-byte rows whose 16-byte vectors are swizzled, as wgmma reads it.
// leading_bytes: from one panel of 64 to the next, where the contiguous dimension has several; else unused.
// stride_bytes: from eight rows to the next eight.
FMD_DEVICE uint64_t matrix_descriptor(SharedAddress start, int leading_bytes, int stride_bytes) {
  constexpr uint64_t kSwizzle128 = 1;
  return (static_cast<uint64_t>(start) & 0x3ffff) >> 4 | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | kSwizzle128 << 62;
}

}  // namespace fmd::cuda

#ifdef __CUDACC__
#include "cuda/device/sm90.cuh"
#else
#include "cuda_host/sm90.h"
#endif

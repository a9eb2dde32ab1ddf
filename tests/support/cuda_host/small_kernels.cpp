// Small kernels for tests of the host execution itself: some with one mistake each, and single instructions.
#include <cstdint>
#include <stdexcept>

#include "cuda/attention_tile.cuh"
#include "cuda/device/grid.h"
#include "cuda/device/sm90.h"
#include "cuda_host/driver.h"

namespace driver {
namespace {

using namespace fmd::cuda;

// Kernels with one mistake each, which the host execution must find. Result: 32 floats, that of the right kernel being
// 1 for every lane.
enum Fault : int64_t {
  kNone,
  kMissingBarrierOfStores,
  kMissingBarrierOfCopies,
  kMissingWarpBarrier,
  kMissingWait,
  kWaitTooShort,
  kEarlyOverwrite,
  kOutOfBounds,
  kDivergence,
  kUnwritten,
  kBankConflict,
  kUnfinishedCopy,
  kNumFaults,
};

template <int64_t kFault>
FMD_KERNEL(64, 1)
faulty_kernel(const float* ones, float* result) {
  float* shared = shared_memory<float>();  // 128 floats: two buffers of 64
  const int thread = thread_index();
  if (kFault == kOutOfBounds && thread == 3) shared[128] = 1.0f;
  // A value of the own warp, and one of the other.
  if (kFault != kUnwritten || thread != 7) shared[64 + thread] = 1.0f;
  if (kFault != kMissingWarpBarrier) warp_barrier();
  const float near = shared[64 + (thread ^ 5)];
  if (kFault != kMissingBarrierOfStores) block_barrier();
  const float middle = shared[64 + (thread ^ 33)];
  block_barrier();
  // And one that an asynchronous copy brings, which 16 threads make.
  const auto copy = [&](int buffer) {
    if (thread < 16) copy_async_16(shared + buffer * 64 + thread * 4, ones + thread * 4, true);
    copy_async_commit();
  };
  copy(0);
  if (kFault == kWaitTooShort) copy(1);
  if (kFault == kWaitTooShort) copy_async_wait<2>();
  if (kFault != kMissingWait && kFault != kUnfinishedCopy && kFault != kWaitTooShort) copy_async_wait<0>();
  if (kFault != kMissingBarrierOfCopies) block_barrier();
  if (kFault == kEarlyOverwrite) copy(0);
  const float far = shared[63 - thread];
  if (kFault == kDivergence && thread % 32 < 4) warp_barrier();
  const float both = shuffle_xor(near * middle * far, 3);
  if (kFault == kBankConflict) {
    uint32_t words[4];
    load_matrices(words, shared_address(shared + thread % 2 * 64));
  }
  if (kFault != kUnfinishedCopy) copy_async_wait<0>();
  if (thread < 32) result[thread] = both;
}

template <int64_t kFault>
void run_faulty(int64_t which) {
  if constexpr (kFault < kNumFaults) {
    if (which != kFault) return run_faulty<kFault + 1>(which);
    const Array ones(64 * sizeof(float)), result(32 * sizeof(float));
    for (int i = 0; i < 64; ++i) ones.at<float>()[i] = 1.0f;
    launch("faulty", faulty_kernel<kFault>, 1, 64, 128 * sizeof(float), nullptr, ones.at<const float>(),
           result.at<float>());
    result.write();
  } else {
    throw std::runtime_error("driver: unknown fault");
  }
}

constexpr int kSm90Rounds = 6, kSlotElements = 16 * kPanelDims;

// Two warpgroups: one copies 16 rows of 64 numbers, all 2^round, into one of two slots in each round, the other sums
// them up with wgmma. From kTrackedNone on the copies themselves arrive, and the reader fences; before that the copying
// threads wait, fence and arrive.
enum Sm90Fault : int64_t {
  kSm90None,
  kNotInitialised,
  kMissingEmptyWait,
  kMissingCopyWait,
  kMissingProxyFence,
  kMissingArrival,
  kMissingFullWait,
  kMissingWgmmaFence,
  kEarlyRelease,
  kReadBeforeWait,
  kTouchedOperand,
  kMissingGroupBarrier,
  kTrackedNone,
  kMissingReaderFence,
  kReaderFenceBeforeWait,
  kPlainArrival,
  kArrivalBeforeCopies,
  kUnfinishedTrackedCopy,
  kMissingEmptyWaitOfTracked,
  kNumSm90Faults,
};

template <int64_t kFault>
FMD_KERNEL(256, 1)
faulty_sm90_kernel(const BFloat16* numbers, float* result) {
  BFloat16* slots = shared_memory<BFloat16>();
  uint64_t* full = reinterpret_cast<uint64_t*>(slots + 2 * kSlotElements);
  uint64_t* empty = full + 2;
  float* shared = reinterpret_cast<float*>(empty + 2);  // [128]
  if (thread_index() == 0 && kFault != kNotInitialised) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(&full[i], kWarpgroupSize);
      mbarrier_init(&empty[i], kWarpgroupSize / kWarpSize);
    }
  }
  block_barrier();
  constexpr bool kTracked = kFault >= kTrackedNone;
  const int thread = thread_index() % kWarpgroupSize;
  if (thread_index() < kWarpgroupSize) {
    for (int round = 0; round < kSm90Rounds; ++round) {
      if (kFault != kMissingEmptyWait && kFault != kMissingEmptyWaitOfTracked) {
        mbarrier_wait(&empty[round % 2], (round / 2 + 1) % 2);
      }
      if (kFault == kArrivalBeforeCopies) copy_async_arrive(&full[round % 2]);
      BFloat16* to = slots + round % 2 * kSlotElements + swizzled<kPanelDims>(thread / 8, thread % 8);
      copy_async_16(to, numbers + round * kSlotElements + thread * kVecElements, true);
      if (kTracked) {
        if (kFault == kPlainArrival) mbarrier_arrive(&full[round % 2]);
        if (kFault != kPlainArrival && kFault != kArrivalBeforeCopies) copy_async_arrive(&full[round % 2]);
        continue;
      }
      copy_async_commit();
      if (kFault != kMissingCopyWait) copy_async_wait<0>();
      if (kFault != kMissingProxyFence) async_proxy_fence();
      if (kFault != kMissingArrival || round + 1 < kSm90Rounds) mbarrier_arrive(&full[round % 2]);
    }
    copy_async_commit();
    if (kFault != kUnfinishedTrackedCopy) copy_async_wait<0>();
    return;
  }
  float d[32] = {}, early = 1.0f;
  for (int round = 0; round < kSm90Rounds; ++round) {
    uint32_t a[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
    if (kFault == kReaderFenceBeforeWait) async_proxy_fence();
    if (kFault != kMissingFullWait) mbarrier_wait(&full[round % 2], round / 2 % 2);
    if (kTracked && kFault != kMissingReaderFence && kFault != kReaderFenceBeforeWait) async_proxy_fence();
    if (kFault != kMissingWgmmaFence) wgmma_fence();
    const SharedAddress slot = shared_address(slots + round % 2 * kSlotElements);
    wgmma_registers<BFloat16, 64>(d, a, matrix_descriptor(slot, 0, kAtomBytes));
    wgmma_commit();
    const auto release = [&] {
      if (thread % kWarpSize == 0) mbarrier_arrive(&empty[round % 2]);
    };
    if (kFault == kEarlyRelease) release();
    if (kFault == kReadBeforeWait) early = d[0] == d[0] ? 1.0f : 0.0f;
    if (kFault == kTouchedOperand) a[1] = 0;
    if (kFault == kEarlyRelease) warp_barrier();
    wgmma_wait<0>();
    if (kFault != kEarlyRelease) release();
  }
  float total = 0.0f;
  for (float value : d) total += value;
  shared[thread] = total / (32 * 16 * ((1 << kSm90Rounds) - 1));
  if (kFault != kMissingGroupBarrier) group_barrier(1, kWarpgroupSize);
  if (thread >= kWarpSize) return;
  result[thread] = early * shared[thread] * shared[thread + 32] * shared[thread + 64] * shared[127 - thread];
}

template <int64_t kFault>
void run_faulty_sm90(int64_t which) {
  if constexpr (kFault < kNumSm90Faults) {
    if (which != kFault) return run_faulty_sm90<kFault + 1>(which);
    const Array numbers(kSm90Rounds * kSlotElements * sizeof(uint16_t)), result(32 * sizeof(float));
    for (int i = 0; i < kSm90Rounds * kSlotElements; ++i) {
      numbers.at<BFloat16>()[i] = from_float<BFloat16>(static_cast<float>(1 << (i / kSlotElements)));
    }
    launch("faulty_sm90", faulty_sm90_kernel<kFault>, 1, 256, 2 * 16 * kPanelDims * 2 + 4 * 8 + 128 * 4, nullptr,
           numbers.at<const BFloat16>(), result.at<float>());
    result.write();
  } else {
    throw std::runtime_error("driver: unknown fault");
  }
}

// Two kernels: four blocks that each write a number, and four behind them that each add all numbers up.
enum GridFault : int64_t { kGridNone, kMissingKernelWait, kReadBeforeKernelWait, kWaitOfSomeThreads, kNothingAllowed };

template <int64_t kFault>
FMD_KERNEL(kWarpSize, 1)
ahead_kernel(float* numbers) {
  if (kFault != kNothingAllowed) allow_blocks_behind();
  if (thread_index() == 0) numbers[block_index()] = 0.25f;
}

template <int64_t kFault>
FMD_KERNEL(2 * kWarpSize, 1)
behind_kernel(const float* numbers, float* result) {
  const float early = numbers[block_index()];
  if (kFault != kMissingKernelWait && (kFault != kWaitOfSomeThreads || thread_index() < kWarpSize)) {
    wait_for_kernel_ahead();
  }
  float sum = kFault == kReadBeforeKernelWait ? early - 0.25f : 0.0f;
  for (int i = 0; i < 4; ++i) sum += numbers[i];
  if (thread_index() < 8) result[block_index() * 8 + thread_index()] = sum;
  if (kFault == kWaitOfSomeThreads) block_barrier();
}

template <int64_t kFault>
void run_faulty_grids(int64_t which) {
  if constexpr (kFault <= kNothingAllowed) {
    if (which != kFault) return run_faulty_grids<kFault + 1>(which);
    const Array numbers(4 * sizeof(float)), result(32 * sizeof(float));
    for (int i = 0; i < 4; ++i) numbers.at<float>()[i] = -1.0f;
    launch_ahead("ahead", ahead_kernel<kFault>, 4, kWarpSize, 0, nullptr, numbers.at<float>());
    launch_behind("behind", behind_kernel<kFault>, 4, 2 * kWarpSize, 0, nullptr, numbers.at<const float>(),
                  result.at<float>());
    result.write();
  } else {
    throw std::runtime_error("driver: unknown fault");
  }
}

// One instruction on given registers and a given image of shared memory: what every lane holds afterwards.
enum Instruction : int64_t { kLoad, kLoadTransposed, kMultiply, kShared128, kRegisters64, kRegisters128 };

// a, b: words of each thread; matrix_a, matrix_b: descriptors of matrices that begin at `start` of the image.
struct FragmentParams {
  int64_t instruction, image_words;
  const uint32_t *image, *a, *b;
  int64_t a_start, b_start, leading, stride;
  float* result;  // [threads, numbers of the instruction]
};

FMD_KERNEL(128, 1)
fragment_kernel(const FragmentParams params) {
  const int thread = thread_index();
  uint32_t* image = shared_memory<uint32_t>();
  for (int64_t i = thread; i < params.image_words; i += kWarpgroupSize) image[i] = params.image[i];
  block_barrier();
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = params.a[thread * 4 + i];
  const SharedAddress start = shared_address(image);
  const int leading = static_cast<int>(params.leading), stride = static_cast<int>(params.stride);
  const uint64_t of_a = matrix_descriptor(start + params.a_start, leading, stride);
  const uint64_t of_b = matrix_descriptor(start + params.b_start, leading, stride);
  float d[64] = {};
  const auto write = [&](const float* values, int count) {
    for (int i = 0; i < count; ++i) params.result[thread * count + i] = values[i];
  };
  const auto wide = [&](const uint32_t (&words)[4]) {
    for (int i = 0; i < 8; ++i) d[i] = to_float(BFloat16{static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))});
    write(d, 8);
  };
  const SharedAddress row = start + static_cast<SharedAddress>(thread % kWarpSize * 16);
  wgmma_fence();
  switch (params.instruction) {
    case kLoad:
      load_matrices(a, row);
      return wide(a);
    case kLoadTransposed:
      load_matrices_transposed(a, row);
      return wide(a);
    case kMultiply: {
      float c[4] = {};
      multiply_add<BFloat16>(c, a, params.b[thread * 2], params.b[thread * 2 + 1]);
      return write(c, 4);
    }
    case kShared128:
      wgmma_shared<BFloat16, 128>(d, of_a, of_b, false);
      wgmma_commit();
      wgmma_wait<0>();
      return write(d, 64);
    case kRegisters64: {
      float narrow[32] = {};
      wgmma_registers<BFloat16, 64>(narrow, a, of_b);
      wgmma_commit();
      wgmma_wait<0>();
      return write(narrow, 32);
    }
    default:
      wgmma_registers<BFloat16, 128>(d, a, of_b);
      wgmma_commit();
      wgmma_wait<0>();
      return write(d, 64);
  }
}

}  // namespace

void faulty(int64_t which) { run_faulty<0>(which); }

void faulty_sm90(int64_t which) { run_faulty_sm90<0>(which); }

void faulty_grids(int64_t which) { run_faulty_grids<0>(which); }

void fragments(int64_t which) {
  FragmentParams params{};
  params.instruction = which;
  params.a_start = number();
  params.b_start = number();
  params.leading = number();
  params.stride = number();
  const Array image = Array::read(), a = Array::read(), b = Array::read(), result = Array::read();
  params.image_words = image.bytes() / 4;
  params.image = image.at<const uint32_t>();
  params.a = a.at<const uint32_t>();
  params.b = b.at<const uint32_t>();
  params.result = result.at<float>();
  launch("fragment", fragment_kernel, 1, kWarpgroupSize, static_cast<int>(image.bytes()), nullptr, params);
  result.write();
}

}  // namespace driver

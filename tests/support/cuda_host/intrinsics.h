// The intrinsics layer on the CPU, for tests: every thread of a block is a fiber, blocks run one after the other. See
// csrc/cuda/device/intrinsics.h for what each name means and intrinsics.cpp for the scheduler.
//
// It is stricter than a GPU wherever the outcome on one would depend on luck:
// - shared memory is an allocation of exactly the launch's size, filled with NaN, so that AddressSanitizer and the
//   results show a read or write outside it, or before it is written;
// - an asynchronous copy fills its target with NaN when it is issued (it may overwrite what others still read) and
//   delivers only at the barrier after its wait (it may be late), or, where an mbarrier tracks it, at any time up to
//   the one at which nothing else could go on;
// - the order of lanes and warps is shuffled by a seed, so that a missing barrier changes results;
// - lanes of a warp that meet in different operations, misaligned addresses and bank conflicts are errors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <vector>

#define FMD_DEVICE inline
#define FMD_KERNEL(threads, min_blocks) void

namespace fmd::cuda {

namespace host {

// What launches do from now on. Seed 0: warps and lanes in order, each warp as far as it gets.
struct Settings {
  uint64_t seed = 0;
  int multiprocessors = 2;
  int compute_capability = 90;
};
Settings& settings();

// A copy of 16 bytes that is under way.
struct PendingCopy {
  void* to;
  const void* from;  // null: zeros
};

// Copies whose completion is an arrival at an mbarrier.
struct TrackedCopies {
  std::vector<PendingCopy> copies;
  uint64_t* barrier;
  void (*arrive)(uint64_t* barrier);
};

struct Thread {
  int index = 0;
  std::vector<std::vector<PendingCopy>> groups;  // oldest first; the last one is not committed yet
  std::vector<PendingCopy> waited_for;           // delivered at the next barrier
  std::deque<TrackedCopies> tracked;             // oldest first; delivered when the scheduler decides
  bool wgmma_fenced = false;                     // since the last wait
  int64_t proxy_fenced_at = 0;                   // time of the last async_proxy_fence()
};

Thread& current_thread();
int64_t current_block();
unsigned char* current_shared_memory();
int current_shared_bytes();

[[noreturn]] void fail(const char* what);

void wait_at_block_barrier();
// Of `threads` threads that name the same id, of which some may only arrive.
void wait_at_group_barrier(int id, int threads);
void arrive_at_group_barrier(int id, int threads);
// Until is_over(barrier, parity). A block in which nobody goes on is an error.
void wait_at_mbarrier(const uint64_t* barrier, int parity, bool (*is_over)(const uint64_t* barrier, int parity));

// All lanes of the warp meet here; then `execute` is called once with the operands of lanes 0 to 31.
using Operands = void* const (&)[32];
void meet(void (*execute)(Operands operands), void* operands);

// What the thread has waited for is there.
void deliver(Thread& thread);
// All uncompleted copies of this thread, from now on tracked by an mbarrier.
void track_copies(uint64_t* barrier, void (*arrive)(uint64_t* barrier));
// The oldest tracked copies of a thread are there, and arrive.
void complete_tracked(Thread& thread);

// Time in the block, for the order of copies' deliveries and proxy fences; and whether what lies at `place` of shared
// memory counts for the asynchronous proxy of a thread that fenced at `fenced_at`: no copy brought it, or the reader or
// the copying thread has fenced since.
int64_t tick();
bool is_in_async_proxy(uint64_t place, int64_t fenced_at);

void run(const char* name, int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel);

struct MatrixOperands {
  uint32_t* words;  // [4]
  const unsigned char* row;
};
void load_matrices(Operands operands);
void load_matrices_transposed(Operands operands);

struct MultiplyOperands {
  float* c;           // [4]
  const uint32_t* a;  // [4]
  uint32_t b[2];
};
void multiply_add_bfloat16(Operands operands);
void multiply_add_float16(Operands operands);

struct ShuffleOperands {
  float value;
  int mask;
  float result;
};
void shuffle_xor(Operands operands);
void warp_barrier(Operands operands);

float float16_to_float(uint16_t bits);
uint16_t float_to_float16(float value);
uint16_t float_to_bfloat16(float value);

inline void require_aligned(const void* pointer, unsigned bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) fail("an address is not aligned");
}

// Reads all 16 bytes here, where AddressSanitizer names the kernel's line.
inline const unsigned char* readable_16(const void* pointer) {
  const auto* row = static_cast<const unsigned char*>(pointer);
  require_aligned(row, 16);
  for (int i = 0; i < 16; ++i) static_cast<void>(*static_cast<const volatile unsigned char*>(row + i));
  return row;
}
inline const unsigned char* matrix_row(uintptr_t address) {
  return readable_16(reinterpret_cast<const void*>(address));
}

}  // namespace host

inline int thread_index() { return host::current_thread().index; }
inline int64_t block_index() { return host::current_block(); }

template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(host::current_shared_memory());
}

inline void block_barrier() {
  host::deliver(host::current_thread());
  host::wait_at_block_barrier();
}
inline void warp_barrier() {
  host::deliver(host::current_thread());
  host::meet(host::warp_barrier, nullptr);
}

inline float shuffle_xor(float value, int mask) {
  host::ShuffleOperands operands{value, mask, 0.0f};
  host::meet(host::shuffle_xor, &operands);
  return operands.result;
}

inline void copy_async_16(void* to, const void* from, bool valid) {
  host::require_aligned(to, 16);
  if (valid) host::readable_16(from);
  std::memset(to, 0xff, 16);
  host::current_thread().groups.back().push_back({to, valid ? from : nullptr});
}
inline void copy_async_commit() { host::current_thread().groups.emplace_back(); }
template <int kPendingGroups>
void copy_async_wait() {
  host::Thread& thread = host::current_thread();
  while (kPendingGroups == 0 && !thread.tracked.empty()) host::complete_tracked(thread);
  while (thread.groups.size() > kPendingGroups + 1) {
    const auto& oldest = thread.groups.front();
    thread.waited_for.insert(thread.waited_for.end(), oldest.begin(), oldest.end());
    thread.groups.erase(thread.groups.begin());
  }
}

using SharedAddress = uintptr_t;
inline SharedAddress shared_address(const void* pointer) { return reinterpret_cast<SharedAddress>(pointer); }

inline void load_matrices(uint32_t (&words)[4], SharedAddress row) {
  host::MatrixOperands operands{words, host::matrix_row(row)};
  host::meet(host::load_matrices, &operands);
}
inline void load_matrices_transposed(uint32_t (&words)[4], SharedAddress row) {
  host::MatrixOperands operands{words, host::matrix_row(row)};
  host::meet(host::load_matrices_transposed, &operands);
}

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
inline void multiply_add<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  host::MultiplyOperands operands{c, a, {b0, b1}};
  host::meet(host::multiply_add_bfloat16, &operands);
}
template <>
inline void multiply_add<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  host::MultiplyOperands operands{c, a, {b0, b1}};
  host::meet(host::multiply_add_float16, &operands);
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
inline float to_float(Float16 value) { return host::float16_to_float(value.bits); }

template <typename T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline BFloat16 from_float<BFloat16>(float value) {
  return {host::float_to_bfloat16(value)};
}
template <>
inline Float16 from_float<Float16>(float value) {
  return {host::float_to_float16(value)};
}
template <typename T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

inline float negative_infinity() { return -std::numeric_limits<float>::infinity(); }
inline float exp2_fast(float value) {
  const float result = std::exp2(value);
  return result < std::numeric_limits<float>::min() ? 0.0f : result;
}
inline float log_accurate(float value) { return std::log(value); }

inline int multiprocessors() { return host::settings().multiprocessors; }
inline int compute_capability() { return host::settings().compute_capability; }

template <typename... Params>
void launch(const char* name, void (*kernel)(Params...), int64_t blocks, int threads, int shared_bytes, void*,
            const Params&... params) {
  host::run(name, blocks, threads, shared_bytes, [&] { kernel(params...); });
}

}  // namespace fmd::cuda

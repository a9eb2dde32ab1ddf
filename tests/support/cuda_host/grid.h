// The operations between grids on the CPU, for tests. See csrc/cuda/device/grid.h for what each name means.
//
// A kernel that is launched ahead does not run until the one behind it is launched. Of that one a block (which one, the
// seed says) runs to where it waits, then the kernel ahead runs as a whole, and the block goes on: what it took from
// the kernel ahead before its wait was not there yet. A block that ends without waiting is an error.
#pragma once

#include "cuda/device/grid.h"

namespace fmd::cuda {

namespace host {

// As run(); `run_ahead` stands for the kernel ahead.
void run_behind(const char* name, int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel);
void keep_ahead(std::function<void()> run_ahead);
void allow_blocks_behind();
void wait_for_kernel_ahead();

}  // namespace host

inline void allow_blocks_behind() { host::allow_blocks_behind(); }
inline void wait_for_kernel_ahead() { host::wait_for_kernel_ahead(); }

inline int take_number(int* counter) { return (*counter)++; }
inline void clear_memory(void* pointer, size_t bytes, void*) { std::memset(pointer, 0, bytes); }

// As on a device with as much shared memory as the largest block here.
inline int64_t blocks_at_once(int shared_bytes) {
  const int64_t fit = 228 * 1024 / (shared_bytes + 1024);
  return (fit < 1 ? 1 : fit) * multiprocessors();
}

template <typename... Params>
void launch_ahead(const char* name, void (*kernel)(Params...), int64_t blocks, int threads, int shared_bytes, void*,
                  const Params&... params) {
  host::keep_ahead([=] { host::run(name, blocks, threads, shared_bytes, [&] { kernel(params...); }); });
}

template <typename... Params>
void launch_behind(const char* name, void (*kernel)(Params...), int64_t blocks, int threads, int shared_bytes, void*,
                   const Params&... params) {
  host::run_behind(name, blocks, threads, shared_bytes, [&] { kernel(params...); });
}

}  // namespace fmd::cuda

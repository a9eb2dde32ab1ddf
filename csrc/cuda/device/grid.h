// Operations between blocks and between the grids of two launches, beside those of intrinsics.h and with two
// implementations like them.
//
// - launch_ahead(...): launch() of a kernel behind which launch_behind() follows at once, on the same stream.
// - launch_behind(...): launch() of a kernel whose blocks may begin before the kernel ahead has ended (programmatic
//   dependent launch; on devices other than 9.0 an ordinary launch). What runs before it in the stream has ended.
// - allow_blocks_behind(): in the kernel ahead: once every block has come to it, those of the kernel behind may begin.
// - wait_for_kernel_ahead(): in the kernel behind, by every thread before it touches what the kernel ahead reads or
//   writes: waits until that has ended and its writes are there.
// - blocks_at_once(shared_bytes): blocks of that size that the current device runs at once, as shared memory
//   allows it, at least one per multiprocessor.
// - take_number(counter): what a counter in global memory held before this adds one to it; of one thread.
// - clear_memory(pointer, bytes, stream): zeros, for what follows in the stream.
#pragma once

#include "cuda/device/intrinsics.h"

#ifdef __CUDACC__
#include "cuda/device/grid.cuh"
#else
#include "cuda_host/grid.h"
#endif

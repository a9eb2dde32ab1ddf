// Which kernel of an op runs, where it has several. build_backend/fmd_kernel_sources.py says what there is.
#pragma once

namespace fmd::cuda {

// Whether `kernel` is the one of `op` that runs on the current device: the one that was chosen by name, else the newest
// whose present source has passed its tests on a device, else the oldest. Throws std::runtime_error where the chosen
// one does not run on this device.
bool runs(const char* op, const char* kernel);

}  // namespace fmd::cuda

// The append, alone and with rotation.
#pragma once

#include "fmd/append.h"
#include "op.h"

namespace fmd {

// Checks all but the values of slots.
AppendParams append_params(const char* op, const Tensor& k_pool, const Tensor& v_pool, const Tensor& k, const Tensor& v,
                           const Tensor& slots);

#ifndef FMD_FOR_CUDA
inline void check_slots(const char* op, const AppendParams& params) {
  check_range(op, "slots", params.slots, params.num_rows, params.num_slots, "slots of the pool");
}
#endif

}  // namespace fmd

// The schemas of all ops, for every device. They live in the CPU library, which is always loaded first; the library of
// another device only adds its implementations (impl_<device>.cpp) to them.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fmd_ext, m) {
  m.def("append_(Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor k, Tensor v, Tensor slots) -> ()");
  m.def(
      "rope_append_(Tensor(a!) k_pool, Tensor(b!) v_pool, Tensor(c!) q_out, Tensor q, Tensor k, Tensor v, Tensor cos, "
      "Tensor sin, Tensor slots) -> ()");
  m.def(
      "branched_prefill(Tensor q, Tensor k, Tensor v, Tensor qo_rows, Tensor cu_seqlens_q, Tensor segments, "
      "int max_qo_len, float softmax_scale, bool return_lse) -> (Tensor, Tensor)");
  m.def(
      "branched_decode(Tensor q, Tensor k, Tensor v, Tensor qo_rows, Tensor segments, float softmax_scale, "
      "bool return_lse) -> (Tensor, Tensor)");
  m.def("merge_(Tensor(a!) hidden, Tensor home_rows, Tensor away_rows, Tensor weights) -> ()");
}

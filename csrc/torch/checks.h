// Checks of op arguments, for every device. A failed check is a ValueError in Python that says which op and argument,
// what was given and what is accepted.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "fmd/params.h"

namespace fmd {

using Tensor = torch::stable::Tensor;
using torch::headeronly::ScalarType;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i > 0 ? ", " : "") << tensor.size(i);
  text << "]";
  return text.str();
}

// A tensor argument of an op, with the words for messages about it.
struct Argument {
  const char* op;
  const char* name;
  const Tensor& tensor;

  template <typename... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    fmd::fail("fmd_ext::", op, ": ", name, " ", parts...);
  }

  // layout: the meaning of the dimensions, as in "[num_rows, head_dim]". A size of -1 accepts any.
  void has_shape(const char* layout, std::initializer_list<int64_t> sizes) const {
    bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
    int64_t i = 0;
    for (int64_t size : sizes) fits = fits && (size == -1 || tensor.size(i) == size), ++i;
    if (fits) return;
    std::ostringstream accepted;
    i = 0;
    for (int64_t size : sizes) {
      accepted << (i++ > 0 ? ", " : "");
      size == -1 ? accepted << "any" : accepted << size;
    }
    fail("has shape ", shape_text(tensor), ", accepted is ", layout, " = [", accepted.str(), "]");
  }

  void has_dtype(ScalarType dtype) const {
    if (tensor.scalar_type() == dtype) return;
    fail("has dtype ", torch::headeronly::toString(tensor.scalar_type()), ", accepted is ",
         torch::headeronly::toString(dtype));
  }

  void has_contiguous_rows() const {
    const int64_t last = tensor.dim() - 1;
    if (tensor.size(last) <= 1 || tensor.stride(last) == 1) return;
    fail("has stride ", tensor.stride(last), " in its last dimension, accepted is 1 (contiguous rows)");
  }

  // For arguments that are written: no two elements at one address.
  void has_no_repeated_memory() const {
    for (int64_t i = 0; i < tensor.dim(); ++i) {
      if (tensor.size(i) <= 1 || tensor.stride(i) != 0) continue;
      fail("is expanded along dimension ", i, ", accepted are tensors in which every element has its own memory");
    }
  }

  void is_contiguous() const {
    if (!tensor.is_contiguous()) fail("of shape ", shape_text(tensor), " is not contiguous");
  }

  void is_on_device_of(const Argument& other) const {
    const auto device = tensor.device();
    const auto accepted = other.tensor.device();
    if (device == accepted) return;
    const auto text = [](const auto& place) {
      return std::string(place.is_cpu()    ? "cpu"
                         : place.is_cuda() ? "cuda:"
                                           : "device ") +
             (place.is_cpu() ? "" : std::to_string(place.index()));
    };
    fail("is on ", text(device), ", accepted is ", text(accepted), " as for ", other.name);
  }

  // A vector of indices: int64, one-dimensional, contiguous.
  void is_index_vector(const char* layout, int64_t size) const {
    has_dtype(ScalarType::Long);
    has_shape(layout, {size});
    is_contiguous();
  }

  DType float_dtype() const {
    switch (tensor.scalar_type()) {
      case ScalarType::Float:
        return DType::kFloat32;
      case ScalarType::BFloat16:
        return DType::kBFloat16;
      case ScalarType::Half:
        return DType::kFloat16;
      default:
        fail("has dtype ", torch::headeronly::toString(tensor.scalar_type()),
             ", accepted are Float, BFloat16 and Half");
    }
  }
};

// Sizes, strides and dtypes of the tensors of both attention ops. cu_seqlens_q: null for decode.
// Leaves out, lse and everything that is read from index tensors to the caller.
BranchedAttentionParams attention_params(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                         const Tensor& qo_rows, const Tensor* cu_seqlens_q, const Tensor& segments,
                                         double softmax_scale);

AppendParams append_params(const char* op, const Tensor& k_pool, const Tensor& v_pool, const Tensor& k, const Tensor& v,
                           const Tensor& slots);

RopeAppendParams rope_append_params(const Tensor& k_pool, const Tensor& v_pool, const Tensor& q_out, const Tensor& q,
                                    const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
                                    const Tensor& slots);

MergeParams merge_params(const Tensor& hidden, const Tensor& home_rows, const Tensor& away_rows, const Tensor& weights);

}  // namespace fmd

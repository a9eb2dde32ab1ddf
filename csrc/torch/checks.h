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

#include "fmd/types.h"

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

  void has_supported_head_dim(int64_t head_dim) const {
    if (head_dim > 0 && head_dim % 8 == 0) return;
    fail("has head_dim ", head_dim, ", accepted are the positive multiples of 8");
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

constexpr const char* kPoolLayout = "[num_kv_heads, num_slots, head_dim]";

// ---- Values of indices: on the CPU only, elsewhere reading them would wait for the device. ----

inline void check_range(const char* op, const char* name, const int64_t* values, int64_t count, int64_t end,
                        const char* what) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] >= 0 && values[i] < end) continue;
    fail("fmd_ext::", op, ": ", name, "[", i, "] is ", values[i], ", accepted are 0 to ", end - 1, " (", what, ")");
  }
}

// Marks rows[i], and refuses a row that was marked before.
inline void mark_rows(const char* op, const char* name, const int64_t* rows, int64_t count, std::vector<char>& marked) {
  for (int64_t i = 0; i < count; ++i) {
    if (marked[rows[i]]) fail("fmd_ext::", op, ": ", name, "[", i, "] is ", rows[i], ", which occurs twice");
    marked[rows[i]] = 1;
  }
}

}  // namespace fmd

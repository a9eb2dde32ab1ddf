// What the parts of the driver share: input, output, and memory of exact size.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace driver {

inline void read_bytes(void* to, size_t bytes) {
  if (bytes > 0 && std::fread(to, 1, bytes, stdin) != bytes) throw std::runtime_error("driver: input ends early");
}

inline int64_t number() {
  int64_t value = 0;
  read_bytes(&value, sizeof(value));
  return value;
}

inline float real() {
  const int64_t bits = number();
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

class Array {
 public:
  explicit Array(int64_t bytes) : bytes_(static_cast<size_t>(bytes)) {
    if (bytes < 0 || posix_memalign(&data_, 256, bytes_ == 0 ? 1 : bytes_) != 0)
      throw std::runtime_error("driver: size");
  }
  ~Array() { std::free(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  static Array read() { return Array(number(), true); }

  template <typename T>
  T* at(int64_t offset_bytes = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + offset_bytes);
  }

  int64_t bytes() const { return static_cast<int64_t>(bytes_); }

  void write() const {
    if (std::fwrite(data_, 1, bytes_, stdout) != bytes_) throw std::runtime_error("driver: cannot write");
  }

 private:
  Array(int64_t bytes, bool) : Array(bytes) { read_bytes(data_, bytes_); }

  void* data_ = nullptr;
  size_t bytes_;
};

// Small kernels, in small_kernels.cpp.
void faulty(int64_t which);
void faulty_sm90(int64_t which);
void faulty_grids(int64_t which);
void fragments(int64_t which);

}  // namespace driver

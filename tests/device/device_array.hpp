// SPDX-License-Identifier: Apache-2.0
// Device memory for tests: owned, filled from the host, read back. Every CUDA error ends the test.
#pragma once

#include <cstring>
#include <packkv/detail/cuda.cuh>
#include <stdexcept>
#include <string>
#include <vector>

namespace packkv_test {

inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

template <class T>
class device_array {
 public:
  device_array() = default;
  explicit device_array(std::size_t count) : count_(count) {
    if (count_ > 0) check_cuda(cudaMalloc(reinterpret_cast<void**>(&data_), count_ * sizeof(T)));
  }
  explicit device_array(const std::vector<T>& host) : device_array(host.size()) { assign(host); }
  device_array(device_array&& other) noexcept : data_(other.data_), count_(other.count_) {
    other.data_ = nullptr;
    other.count_ = 0;
  }
  device_array& operator=(device_array&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~device_array() {
    if (data_ != nullptr) (void)cudaFree(data_);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  std::size_t size() const { return count_; }

  void assign(const std::vector<T>& host) {
    if (count_ > 0) check_cuda(cudaMemcpy(data_, host.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  /// Fills with a byte value; 0xff makes 16-bit and 32-bit floats NaN.
  void poison(int byte = 0xff) {
    if (count_ > 0) check_cuda(cudaMemset(data_, byte, count_ * sizeof(T)));
  }
  std::vector<T> host() const {
    std::vector<T> copy(count_);
    check_cuda(cudaDeviceSynchronize());
    if (count_ > 0) check_cuda(cudaMemcpy(copy.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return copy;
  }

 private:
  T* data_ = nullptr;
  std::size_t count_ = 0;
};

}  // namespace packkv_test

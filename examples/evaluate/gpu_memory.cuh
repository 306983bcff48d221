// SPDX-License-Identifier: Apache-2.0
// Device memory for evaluate: owned, copied from the host; the first error of CUDA is kept.
#pragma once

#include <cstdint>
#include <memory>
#include <packkv/core/views.hpp>
#include <packkv/detail/cuda.cuh>

namespace evaluate {

namespace pk = packkv;

struct device_free {
  void operator()(void* p) const { (void)cudaFree(p); }
};
using device_memory = std::unique_ptr<void, device_free>;

/// Remembers the first CUDA error; later steps are skipped.
class device {
 public:
  pk::status error;

  device_memory allocate(std::int64_t bytes) {
    void* p = nullptr;
    if (error && bytes > 0) note(cudaMalloc(&p, static_cast<std::size_t>(bytes)));
    return device_memory(p);
  }
  device_memory copy(const void* host, std::int64_t bytes) {
    if (host == nullptr) return nullptr;
    device_memory memory = allocate(bytes);
    if (error && memory) note(cudaMemcpy(memory.get(), host, static_cast<std::size_t>(bytes), cudaMemcpyHostToDevice));
    return memory;
  }
  void note(cudaError_t e) {
    if (error && e != cudaSuccess) error = pk::refuse(pk::status_code::cuda_error, cudaGetErrorString(e), e);
  }
};

inline std::int64_t view_bytes(const pk::input_view<3>& v) { return v.extent[0] * v.extent[1] * v.extent[2] * 2; }

}  // namespace evaluate

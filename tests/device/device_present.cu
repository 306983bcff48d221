// SPDX-License-Identifier: Apache-2.0
#include <packkv/detail/cuda.cuh>

const char* why_no_device() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count > 0 ? nullptr : "no device found";
}

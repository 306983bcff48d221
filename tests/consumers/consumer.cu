// SPDX-License-Identifier: Apache-2.0
// The same from nvcc; runs on a machine without a GPU, too.
#include <cstdio>

#include <packkv/packkv.hpp>
#if __has_include(<packkv/packkv.cuh>)
#include <packkv/packkv.cuh>
#endif

__global__ void version(int* out) { *out = PACKKV_VERSION_MAJOR * 10000 + PACKKV_VERSION_MINOR * 100 + PACKKV_VERSION_PATCH; }

int main() {
  int* out = nullptr;
  if (cudaMalloc(&out, sizeof(int)) != cudaSuccess) {
    std::printf("compiled; no GPU to run on\n");
    return 0;
  }
  version<<<1, 1>>>(out);
  int value = 0;
  const bool copied = cudaMemcpy(&value, out, sizeof(int), cudaMemcpyDeviceToHost) == cudaSuccess;
  cudaFree(out);
  std::printf("packkv %d on the GPU\n", value);
  return copied && value == PACKKV_VERSION_MAJOR * 10000 + PACKKV_VERSION_MINOR * 100 + PACKKV_VERSION_PATCH ? 0 : 1;
}

// SPDX-License-Identifier: Apache-2.0
// The CUDA calls of the library as tests see them: on a GPU the linker takes these functions instead of the runtime's
// (--wrap, tests/CMakeLists.txt), the executor asks before each call.
#include "cuda_failures.hpp"

#include <cstdio>

packkv_test::watched_calls packkv_test::cuda_calls;

namespace {

cudaError_t failure() {
  packkv_test::watched_calls& calls = packkv_test::cuda_calls;
  if (calls.left < 0 || calls.left-- > 0) return cudaSuccess;
  calls.failed = true;
  ++calls.in_all;
#if !defined(PACKKV_SIMT_EXECUTOR)
  calls.pending = true;
#endif
  return cudaErrorMemoryAllocation;
}

#if !defined(PACKKV_SIMT_EXECUTOR)
struct at_the_end {
  ~at_the_end() {
    if (packkv_test::cuda_calls.in_all > 0)
      std::printf("RECORD: %lld CUDA calls of the library made to fail\n", packkv_test::cuda_calls.in_all);
  }
} record;
#else
[[maybe_unused]] const bool asked = (packkv_simt::instead_of_call = [] { return static_cast<int>(failure()); }, true);
#endif

}  // namespace

#if !defined(PACKKV_SIMT_EXECUTOR)
extern "C" {
cudaError_t __real_cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**);
cudaError_t __real_cudaMemsetAsync(void*, int, std::size_t, cudaStream_t);
cudaError_t __real_cudaFuncSetAttribute(const void*, cudaFuncAttribute, int);
cudaError_t __real_cudaFuncGetAttributes(cudaFuncAttributes*, const void*);
cudaError_t __real_cudaGetLastError();

cudaError_t __wrap_cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  const cudaError_t error = failure();
  return error != cudaSuccess ? error : __real_cudaLaunchKernelExC(config, kernel, arguments);
}
cudaError_t __wrap_cudaMemsetAsync(void* p, int byte, std::size_t bytes, cudaStream_t stream) {
  const cudaError_t error = failure();
  return error != cudaSuccess ? error : __real_cudaMemsetAsync(p, byte, bytes, stream);
}
cudaError_t __wrap_cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute what, int value) {
  const cudaError_t error = failure();
  return error != cudaSuccess ? error : __real_cudaFuncSetAttribute(kernel, what, value);
}
cudaError_t __wrap_cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  const cudaError_t error = failure();
  return error != cudaSuccess ? error : __real_cudaFuncGetAttributes(attributes, kernel);
}
cudaError_t __wrap_cudaGetLastError() {
  packkv_test::cuda_calls.pending = false;
  return __real_cudaGetLastError();
}
}
#endif

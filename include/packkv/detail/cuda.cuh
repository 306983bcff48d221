// SPDX-License-Identifier: Apache-2.0
// The one door to the CUDA runtime and to what kernels need of the machine: launches, shuffles, wide copies.
// The CPU executor of the tests replaces <cuda_runtime.h> by its own header and these functions keep their meaning.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(PACKKV_SIMT_EXECUTOR)
#include <packkv_simt.hpp>
#else
#include <cuda_runtime.h>
#endif

#include <packkv/core/status.hpp>

namespace packkv::detail {

inline constexpr int warp_threads = 32;
inline constexpr unsigned all_lanes = 0xffffffffu;

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % warp_threads; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / warp_threads; }

/// All 32 lanes take part. Results are the same in every lane where the operation is commutative.
template <class T>
__device__ inline T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(all_lanes, x, mask);
}
template <class T>
__device__ inline T shuffle(T x, int lane) {
  return __shfl_sync(all_lanes, x, lane);
}
__device__ inline float warp_max(float x) {
  for (int m = 16; m > 0; m /= 2) x = fmaxf(x, shuffle_xor(x, m));
  return x;
}
template <class T>
__device__ inline T warp_sum(T x) {
  for (int m = 16; m > 0; m /= 2) x += shuffle_xor(x, m);
  return x;
}

/// 2^x as the hardware computes it (two units in the last place; 2^-inf = 0).
__device__ inline float exp2_approx(float x) { return exp2f(x); }

struct alignas(16) bytes16 {
  std::uint32_t word[4];
};

/// 16-byte store; the address is a multiple of 16.
__device__ inline void store16(void* p, const bytes16& x) { *static_cast<bytes16*>(p) = x; }

/// A load that sees what other blocks wrote in this launch.
__device__ inline float load_fresh(const float* p) { return __ldcg(p); }

/// Launches a kernel; a refusal of the runtime becomes a status. Never synchronises.
template <class... Parameter>
inline status launch(void (*kernel)(Parameter...), dim3 grid, int threads, cudaStream_t stream,
                     Parameter... parameter) {
#if defined(PACKKV_SIMT_EXECUTOR)
  (void)stream;
  const auto error =
      static_cast<cudaError_t>(packkv_simt::launch(kernel, grid, dim3(static_cast<unsigned>(threads)), parameter...));
#else
  void* pointers[] = {static_cast<void*>(&parameter)...};
  const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid,
                                             dim3(static_cast<unsigned>(threads)), pointers, 0, stream);
#endif
  if (error == cudaSuccess) return {};
  (void)cudaGetLastError();
  return refuse(status_code::cuda_error, cudaGetErrorString(error), error);
}

/// Zeroes memory in stream order.
inline status clear(void* p, std::size_t bytes, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(p, 0, bytes, stream);
  if (error == cudaSuccess) return {};
  (void)cudaGetLastError();
  return refuse(status_code::cuda_error, cudaGetErrorString(error), error);
}

}  // namespace packkv::detail

// SPDX-License-Identifier: Apache-2.0
// Sizes of variable-size tiles become the offsets where they begin, in place.
// One idea: one block walks over the array, so that nothing waits for another block and no workspace is needed.
//   detail::launch(kernel::scan_offsets<kernel::scan_threads>, dim3(1), kernel::scan_threads, stream, offsets, tiles,
//   std::int64_t{0});
#pragma once

#include <cstdint>
#include <packkv/detail/cuda.cuh>

namespace packkv::kernel {

inline constexpr int scan_threads = 256;  ///< of the library's own launches

/// offsets [count + 1]: the sizes at 1 .. count become ends, offsets[i] = first + size 1 + ... + size i; offsets[0] is
/// written, too. count >= 0. Grid: one block of `Threads`,
/// a multiple of 32.
template <int Threads>
__global__ void __launch_bounds__(Threads) scan_offsets(std::int64_t* offsets, std::int64_t count, std::int64_t first) {
  using namespace packkv::detail;
  constexpr int warps = Threads / warp_threads;
  __shared__ std::int64_t warp_size[warps];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) offsets[0] = first;
  std::int64_t end = first;  // of the chunks so far
  for (std::int64_t chunk = 0; chunk < count; chunk += Threads) {
    const std::int64_t i = chunk + thread;
    const std::int64_t sum = warp_prefix_sum(i < count ? offsets[i + 1] : std::int64_t{0});
    if (lane_id() == warp_threads - 1) warp_size[warp_id()] = sum;
    __syncthreads();
    std::int64_t begin = end;  // of this warp
    for (int w = 0; w < warps; ++w) {
      if (w == warp_id()) begin = end;
      end += warp_size[w];
    }
    if (i < count) offsets[i + 1] = begin + sum;
    __syncthreads();
  }
}

}  // namespace packkv::kernel

// SPDX-License-Identifier: Apache-2.0
// Adds up parts of up to 16 rows of sums: of the warps of a block in shared memory, of blocks in global memory.
// One idea: a part is Rows rows of HeadDim sums and the weight behind them; a thread adds one float of all parts in
// their order, so that the result repeats bit for bit.
//   using merge = sum_merge<D, Rows, Threads>;   merge::join_warps(parts, stride, warps, to);   __syncthreads();
#pragma once

#include <packkv/block/arrival.cuh>

namespace packkv::block {

/// Adds up parts of rows (sums, weight) of the warps of a block, and of blocks, by a block of `Threads` threads.
template <int HeadDim, int Rows, int Threads>
struct sum_merge {
  /// Floats of a row: its channels, its weight, and padding that keeps rows on different banks.
  static constexpr int row_floats = HeadDim + 8;
  static constexpr int weight_at = HeadDim;
  static constexpr int part_floats = Rows * row_floats;

  /// Adds `count` parts that lie `stride` floats apart at `parts` in shared memory into `to`, another part in shared or
  /// global memory. The caller synchronises the block before and after.
  __device__ static void join_warps(const float* parts, int stride, int count, float* to) {
    join(
        count, parts, parts, stride, [](const float* x) { return *x; }, to);
  }
  /// Adds `count` parts in global memory that other blocks have written into `to` in shared memory: the first, and
  /// those at all + stride, all + 2 * stride, ... The caller synchronises the block before and after.
  __device__ static void join_blocks(int count, const float* first, const float* all, int stride, float* to) {
    join(count, first, all, stride, detail::load_fresh, to);
  }

 private:
  static constexpr int at_once = 16;  ///< loads on their way

  template <class Load>
  __device__ static void join(int count, const float* zeroth, const float* all, int stride, Load&& load, float* to) {
#pragma unroll 1
    for (int at = static_cast<int>(threadIdx.x); at < part_floats; at += Threads) {
      if (at % row_floats > weight_at) continue;
      float sum = load(zeroth + at);
#pragma unroll 1
      for (int first = 1; first < count; first += at_once) {
        const float* from = all + first * static_cast<std::int64_t>(stride) + at;
        float x[at_once];
#pragma unroll
        for (int i = 0; i < at_once; ++i, from += stride) x[i] = first + i < count ? load(from) : 0.0f;
#pragma unroll
        for (int i = 0; i < at_once; ++i) sum += x[i];
      }
      to[at] = sum;
    }
  }
};

}  // namespace packkv::block

// SPDX-License-Identifier: Apache-2.0
// Joins parts of up to 16 query rows: of the warps of a block in shared memory, of blocks in global memory.
// One idea: a part is Rows rows of HeadDim sums, maximum and weight; parts are joined in a fixed order by all threads,
// each for channels of its own, so that the result repeats bit for bit.
//   using merge = part_merge<D, Rows, Warps>;   merge::join_warps(parts, stride, Warps, to);   __syncthreads();
#pragma once

#include <packkv/warp/attention_row.cuh>

namespace packkv::block {

/// True in the last of others + 1 blocks that come here for the same counter (0 before and after), which then sees what
/// the others have written. All threads take part; `last` lies in shared memory.
__device__ inline bool last_to_arrive(std::uint32_t* counter, unsigned others, bool& last) {
  __syncthreads();
  if (threadIdx.x == 0) last = detail::arrive(counter, others) == others;
  __syncthreads();
  return last;
}

/// Parts that join_blocks can take with this scratch.
constexpr int max_parts(int scratch_floats, int threads, int rows) { return (scratch_floats - threads * 4) / rows; }

/// Joins parts of rows (sums, maximum, weight) of the warps of a block, and of blocks.
template <int HeadDim, int Rows, int Warps>
struct part_merge {
  static constexpr int threads = Warps * detail::warp_threads;
  /// Floats of a row: its channels, maximum and sum, and padding that keeps rows on different banks.
  static constexpr int row_floats = HeadDim + 8;
  static constexpr int maximum_at = HeadDim, sum_at = HeadDim + 1;
  static constexpr int part_floats = Rows * row_floats;

  /// Joins `count` <= Warps parts that lie `stride` floats apart at `parts` in shared memory into `to`, another part in
  /// shared or global memory. The caller synchronises the block before and after.
  __device__ static void join_warps(const float* parts, int stride, int count, float* to) {
    for (int i = static_cast<int>(threadIdx.x); i < Rows * HeadDim; i += threads) {
      const int row = i / HeadDim, channel = i % HeadDim;
      const float* const from = parts + row * row_floats;
      float maximum = from[maximum_at];
      for (int w = 1; w < Warps; ++w)
        if (w < count) maximum = fmaxf(maximum, from[w * stride + maximum_at]);
      float sum = 0.0f, value = 0.0f;
      for (int w = 0; w < Warps; ++w) {
        if (w >= count) break;
        const float factor = detail::exp2_fast(from[w * stride + maximum_at] - maximum);
        sum = fmaf(factor, from[w * stride + sum_at], sum);
        value = fmaf(factor, from[w * stride + channel], value);
      }
      float* const row_to = to + row * row_floats;
      row_to[channel] = value;
      if (channel == 0) {
        row_to[maximum_at] = maximum;
        row_to[sum_at] = sum;
      }
    }
  }

  /// Joins `count` parts that other blocks have written, part(i) in global memory, into `to` in shared memory, with
  /// scratch memory beside it: at most max_parts. meanwhile(thread, count) runs while the first of them arrive, in the
  /// threads that have nothing else to do, or in all. The caller synchronises the block before and after.
  template <class Part, class Meanwhile>
  __device__ static void join_blocks(int count, Part&& part, Meanwhile&& meanwhile, float* scratch, float* to) {
    float* const sums = scratch;                   // [slices][Rows * HeadDim]
    float* const factors = scratch + threads * 4;  // [Rows][count]
    // Four channels a thread; as many slices of the parts as there are threads for. The first loads start at once.
    constexpr int quads = Rows * HeadDim / 4, slices = quads < threads ? threads / quads : 1, ahead = 8;
    const int slice = static_cast<int>(threadIdx.x) / quads;
    const auto channels = [&](int p, int q) {
      return detail::load_fresh4(part(p) + q / (HeadDim / 4) * row_floats + q % (HeadDim / 4) * 4);
    };
    detail::floats4 early[ahead] = {};
    const int first = static_cast<int>(threadIdx.x) % quads;
#pragma unroll
    for (int i = 0; i < ahead; ++i)
      if (slice < slices && slice + i * slices < count) early[i] = channels(slice + i * slices, first);
    constexpr int idle = Warps > Rows ? Warps - Rows : Warps;
    if (detail::warp_id() >= Warps - idle)
      meanwhile(static_cast<int>(threadIdx.x) - (Warps - idle) * detail::warp_threads, idle * detail::warp_threads);

    for (int row = detail::warp_id(); row < Rows; row += Warps) {
      const auto read = [&](int p, int at) { return detail::load_fresh(part(p) + row * row_floats + at); };
      float maximum = warp::attention_row<HeadDim>::lowest, sum = 0.0f;
      for (int p = detail::lane_id(); p < count; p += detail::warp_threads) {
        const float m = read(p, maximum_at), l = read(p, sum_at), top = fmaxf(maximum, m);
        sum = fmaf(sum, detail::exp2_fast(maximum - top), l * detail::exp2_fast(m - top));
        maximum = top;
        factors[row * count + p] = m;
      }
      const float top = detail::warp_max(maximum);
      sum = detail::warp_sum(sum * detail::exp2_fast(maximum - top));
      for (int p = detail::lane_id(); p < count; p += detail::warp_threads)
        factors[row * count + p] = detail::exp2_fast(factors[row * count + p] - top);
      if (detail::lane_id() == 0) {
        to[row * row_floats + maximum_at] = top;
        to[row * row_floats + sum_at] = sum;
      }
    }
    __syncthreads();
    for (int q = first; q < quads && slice < slices; q += threads) {
      const int row = q / (HeadDim / 4), channel = q % (HeadDim / 4) * 4;
      float sum[4] = {};
      const auto add = [&](int p, const detail::floats4& x) {
        for (int i = 0; i < 4; ++i) sum[i] = fmaf(factors[row * count + p], x.value[i], sum[i]);
      };
#pragma unroll
      for (int i = 0; i < ahead; ++i)
        if (slice + i * slices < count)
          add(slice + i * slices, q == first ? early[i] : channels(slice + i * slices, q));
#pragma unroll 8
      for (int p = slice + ahead * slices; p < count; p += slices) add(p, channels(p, q));
      for (int i = 0; i < 4; ++i)
        if constexpr (slices > 1)
          sums[(slice * quads + q) * 4 + i] = sum[i];
        else
          to[row * row_floats + channel + i] = sum[i];
    }
    if constexpr (slices > 1) {
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < Rows * HeadDim; i += threads) {
        float sum = 0.0f;
        for (int s = 0; s < slices; ++s) sum += sums[s * Rows * HeadDim + i];
        to[i / HeadDim * row_floats + i % HeadDim] = sum;
      }
    }
  }

  /// Copies a part that another block has written. By `count` threads, each with its number.
  __device__ static void copy_fresh(const float* from, float* to, int thread, int count) {
    for (int i = thread; i < part_floats; i += count)
      if (i % row_floats <= sum_at) to[i] = detail::load_fresh(from + i);
  }

  /// Row `row` of a joined part, for one warp; from shared memory, or from global memory that this block did not write.
  __device__ static warp::attention_row<HeadDim> read_row(const float* part, int row) {
    warp::attention_row<HeadDim> x;
    const float* const from = part + row * row_floats;
    for (int i = 0; i < HeadDim / 32; ++i) x.channel[i] = from[detail::lane_id() + 32 * i];
    x.maximum = from[maximum_at];
    x.sum = from[sum_at];
    return x;
  }
};

}  // namespace packkv::block

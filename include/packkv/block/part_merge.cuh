// SPDX-License-Identifier: Apache-2.0
// Joins parts of up to 16 query rows: of the warps of a block in shared memory, of blocks in global memory.
// One idea: a part is Rows rows of HeadDim sums, maximum and weight; parts are joined in a fixed order, a warp has 32
// channels of a row and waits for no other, so that the result repeats bit for bit.
//   using merge = part_merge<D, Rows, Warps>;   merge::join_warps(parts, stride, Warps, to);   __syncthreads();
#pragma once

#include <packkv/block/arrival.cuh>
#include <packkv/warp/attention_row.cuh>

namespace packkv::block {

/// Most blocks that a launch is split into at a caller's wish: how many parts there may be of a unit.
inline constexpr int max_parts = 4096;

/// Joins parts of rows (sums, maximum, weight) of the warps of a block, and of blocks.
template <int HeadDim, int Rows, int Warps>
struct part_merge {
  /// Floats of a row: its channels, maximum and sum, and padding that keeps rows on different banks.
  static constexpr int row_floats = HeadDim + 8;
  static constexpr int maximum_at = HeadDim, sum_at = HeadDim + 1;
  static constexpr int part_floats = Rows * row_floats;

  /// Joins `count` <= Warps parts that lie `stride` floats apart at `parts` in shared memory into `to`, another part in
  /// shared or global memory. The caller synchronises the block before and after.
  __device__ static void join_warps(const float* parts, int stride, int count, float* to) {
    join<at_once(Warps)>(
        count, parts, parts, stride, [](const float* x) { return *x; }, to);
  }
  /// Joins `count` parts in global memory that other blocks have written, into `to` in shared memory: the first, and
  /// those at all + stride, all + 2 * stride, ... The caller synchronises the block before and after.
  __device__ static void join_blocks(int count, const float* first, const float* all, int stride, float* to) {
    join<most_at_once>(count, first, all, stride, detail::load_fresh, to);
  }

  /// Row `row` of a joined part, for one warp; from shared memory.
  __device__ static warp::attention_row<HeadDim> read_row(const float* part, int row) {
    return read_row_by(part, row, [](const float* x) { return *x; });
  }
  /// The same from global memory that another block has written.
  __device__ static warp::attention_row<HeadDim> read_fresh_row(const float* part, int row) {
    return read_row_by(part, row, detail::load_fresh);
  }

 private:
  static constexpr int most_at_once = 16;  ///< a lane has the factor of one of them
  PACKKV_HOST_DEVICE static constexpr int at_once(int most) {
    int n = 1;
    while (n < most && n < most_at_once) n *= 2;
    return n;
  }

  template <class Load>
  __device__ static warp::attention_row<HeadDim> read_row_by(const float* part, int row, Load&& load) {
    warp::attention_row<HeadDim> x;
    const float* const from = part + row * row_floats;
    for (int i = 0; i < HeadDim / 32; ++i) x.channel[i] = load(from + detail::lane_id() + 32 * i);
    x.maximum = load(from + maximum_at);
    x.sum = load(from + sum_at);
    return x;
  }

  /// A warp joins 32 channels of a row, and needs no other for it: of AtOnce parts at a time everything is loaded, then
  /// a lane each works out their factors.
  template <int AtOnce, class Load>
  __device__ static void join(int count, const float* zeroth, const float* all, int stride, Load&& load, float* to) {
    constexpr int slabs = HeadDim / 32;
    static_assert((AtOnce & (AtOnce - 1)) == 0 && AtOnce <= most_at_once, "a part has lanes of its own");
#pragma unroll 1
    for (int c = detail::warp_id(); c < Rows * slabs; c += Warps) {
      const int at = c / slabs * row_floats, channel = at + c % slabs * 32 + detail::lane_id();
      float maximum = warp::attention_row<HeadDim>::lowest, sum = 0.0f, value = 0.0f;
#pragma unroll 1
      for (int first = 0; first < count; first += AtOnce) {
        const int own = first + detail::lane_id() % AtOnce;
        const bool is_part = own < count;
        const float* const parts = all + first * stride;
        const float* const slab = parts + channel;  // one address, from which the others are constants away
        const float* const row = (is_part && own > 0 ? parts + (own - first) * stride
                                  : first > 0        ? parts
                                                     : zeroth) +
                                 at;
        const float own_maximum = load(row + maximum_at), own_sum = load(row + sum_at);
        float x[AtOnce];
#pragma unroll
        for (int i = 0; i < AtOnce; ++i)
          x[i] = i < count - first ? load(i == 0 && first == 0 ? zeroth + channel : slab + i * stride) : 0.0f;
        float top = fmaxf(maximum, is_part ? own_maximum : maximum);
        for (int m = AtOnce / 2; m > 0; m /= 2) top = fmaxf(top, detail::shuffle_xor(top, m));
        const float factor = is_part ? detail::exp2_fast(own_maximum - top) : 0.0f;
        float weight = is_part ? factor * own_sum : 0.0f;
        for (int m = AtOnce / 2; m > 0; m /= 2) weight += detail::shuffle_xor(weight, m);
        const float keep = detail::exp2_fast(maximum - top);
        maximum = top;
        sum = fmaf(sum, keep, weight);
        value *= keep;
#pragma unroll
        for (int i = 0; i < AtOnce; ++i) value = fmaf(detail::shuffle(factor, i), x[i], value);
      }
      to[channel] = value;
      if (c % slabs == 0 && detail::lane_id() == 0) {
        to[at + maximum_at] = maximum;
        to[at + sum_at] = sum;
      }
    }
  }
};

}  // namespace packkv::block

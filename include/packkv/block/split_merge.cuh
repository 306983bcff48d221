// SPDX-License-Identifier: Apache-2.0
// Joins the blocks that share one unit of output (split-KV): the last block to arrive adds the others in order.
// One idea: a counter per unit says who is last and returns to zero, so a workspace is initialised once for ever.
//   if (split_merge<D, 4>::is_last(partials, unit, split, splits, row)) write(row);
#pragma once

#include <packkv/block/row_merge.cuh>

namespace packkv::block {

/// Where split results meet: counters (zero between launches) and partial rows.
struct split_storage {
  std::uint32_t* counters;  ///< one per unit
  float* rows;              ///< [units][splits][Rows][HeadDim + 2]
};

/// Joins the rows of blocks that share a unit of output.
template <int HeadDim, int Rows>
struct split_merge {
  /// Floats of partial rows that `units` units of `splits` splits need.
  static constexpr std::int64_t floats_per_split = static_cast<std::int64_t>(Rows) * (HeadDim + 2);

  /// Hands in this block's rows (warp w: row w). In the last block of a unit it returns true and `row` has become the
  /// whole. All threads of the block take part and get the same answer.
  __device__ static bool is_last(const split_storage& storage, std::int64_t unit, int split, int splits,
                                 attention_row<HeadDim>& row) {
    if (splits == 1) return true;
    __shared__ bool last;
    const int lane = detail::lane_id(), warp = detail::warp_id();
    float* unit_rows = storage.rows + unit * splits * floats_per_split;
    float* mine = unit_rows + split * floats_per_split + warp * (HeadDim + 2);
    for (int i = 0; i < HeadDim / 32; ++i) mine[lane + 32 * i] = row.channel[i];
    if (lane == 0) {
      mine[HeadDim] = row.maximum;
      mine[HeadDim + 1] = row.sum;
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0)
      last = atomicInc(storage.counters + unit, static_cast<unsigned>(splits - 1)) == static_cast<unsigned>(splits - 1);
    __syncthreads();
    if (!last) return false;
    __threadfence();
    row = read(unit_rows + warp * (HeadDim + 2));
    for (int s = 1; s < splits; ++s) row.join(read(unit_rows + s * floats_per_split + warp * (HeadDim + 2)));
    return true;
  }

 private:
  __device__ static attention_row<HeadDim> read(const float* from) {
    attention_row<HeadDim> row;
    for (int i = 0; i < HeadDim / 32; ++i) row.channel[i] = detail::load_fresh(from + detail::lane_id() + 32 * i);
    row.maximum = detail::load_fresh(from + HeadDim);
    row.sum = detail::load_fresh(from + HeadDim + 1);
    return row;
  }
};

}  // namespace packkv::block

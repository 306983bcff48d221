// SPDX-License-Identifier: Apache-2.0
// Joins what the warps of a block have summed over different tiles: warp w ends with row w of the result.
// One idea: warps meet once, after their tiles, in a fixed order, so the result repeats bit for bit.
//   auto row = row_merge<D, 4>::merge(storage, softmax, sum);   // row.channel[i] is channel lane + 32 * i
#pragma once

#include <packkv/warp/attention_row.cuh>
#include <packkv/warp/online_softmax.cuh>
#include <packkv/warp/value_sum.cuh>

namespace packkv::block {

using warp::attention_row;

/// Rows = warps of the block.
template <int HeadDim, int Rows>
struct row_merge {
  /// Rows * Rows * (HeadDim + 2) * 4 bytes.
  struct temp_storage {
    float channel[Rows][Rows][HeadDim];  // [warp][row]
    float maximum[Rows][Rows];
    float sum[Rows][Rows];
  };

  /// All threads of the block take part; ends with the storage free for reuse after the next __syncthreads().
  __device__ static attention_row<HeadDim> merge(temp_storage& storage, const warp::online_softmax<Rows>& softmax,
                                                 const warp::value_sum<HeadDim, Rows>& part) {
    const int lane = detail::lane_id(), warp = detail::warp_id();
    for (int r = 0; r < Rows; ++r) {
      for (int i = 0; i < HeadDim / 32; ++i) storage.channel[warp][r][lane + 32 * i] = part.channel[r][i];
      if (lane == 0) {
        storage.maximum[warp][r] = softmax.maximum[r];
        storage.sum[warp][r] = softmax.sum[r];
      }
    }
    __syncthreads();
    attention_row<HeadDim> row = read(storage, 0, warp);
    for (int w = 1; w < Rows; ++w) row.join(read(storage, w, warp));
    return row;
  }

  /// Moves row `warp` into the original basis: y becomes T^-1 (column * y) + sum * offset. Uses the row's own part of
  /// the storage.
  __device__ static void finish(temp_storage& storage, const codec_spec& spec, const head_parameters& head,
                                attention_row<HeadDim>& row) {
    float* scratch = storage.channel[0][detail::warp_id()];
    __syncwarp();
    warp::value_sum<HeadDim, Rows>::finish(spec, head, row.channel, row.sum, [&](int c, float x) { scratch[c] = x; });
    __syncwarp();
    for (int i = 0; i < HeadDim / 32; ++i) row.channel[i] = scratch[detail::lane_id() + 32 * i];
  }

 private:
  __device__ static attention_row<HeadDim> read(const temp_storage& storage, int warp, int r) {
    attention_row<HeadDim> row;
    row.maximum = storage.maximum[warp][r];
    row.sum = storage.sum[warp][r];
    for (int i = 0; i < HeadDim / 32; ++i) row.channel[i] = storage.channel[warp][r][detail::lane_id() + 32 * i];
    return row;
  }
};

}  // namespace packkv::block

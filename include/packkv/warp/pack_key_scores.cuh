// SPDX-License-Identifier: Apache-2.0
// Scores of a few queries against groups of 16 unpacked keys, by products of bytes.
// One idea: a query in fixed point is four signed bytes per channel, and their sums with codes are exact; so is what
// makes scores of them, in double. Nothing is lost where large codes and zero points cancel.
//   using keys = pack_key_scores<128, 2>;   keys::prepare(shared, load, scale, warp_id(), warps);   __syncthreads();
//   const keys k(shared);   for (g = 0; g < 4; ++g) { k.compute(codes, sums); k.keep(own, g, sums); }   __syncwarp();
//   score = k.score(shared, own, row, slot, step_of_slot);
#pragma once

#include <packkv/codec/pack_quantize.hpp>
#include <packkv/detail/limbs.cuh>
#include <packkv/detail/matrix.cuh>
#include <packkv/warp/pack_codes.cuh>

namespace packkv::warp {

/// Rows queries, an even number; two make one operand B.
template <int HeadDim, int Rows>
class pack_key_scores {
 public:
  static_assert(Rows > 0 && Rows % 2 == 0, "a product has columns for the limbs of two queries");
  using group_codes = pack_group_codes<HeadDim>;
  static constexpr int lane_channels = group_codes::lane_channels, passes = Rows / 2;

  /// Of a block, in shared memory.
  struct temp_storage {
    std::uint32_t limbs[Rows][HeadDim];
    double unit[Rows];  ///< of the fixed point, times the scale of the scores; NaN if the query is not finite
    double sum[Rows];   ///< of the query's channels, in units
  };

  /// Makes the queries, load(r, channel), fixed-point numbers. By warp `warp` of `warps`; the caller synchronises the
  /// block before and after.
  template <class Load>
  __device__ static void prepare(temp_storage& storage, Load&& load, float scale, int warp, int warps) {
    using namespace packkv::detail;
    for (int r = warp; r < Rows; r += warps) {
      float q[lane_channels];
      std::uint32_t largest = 0;
      for (int i = 0; i < lane_channels; ++i) {
        q[i] = load(r, lane_id() + warp_threads * i);
        largest = max_of(largest, bit_cast<std::uint32_t>(q[i]) & 0x7fffffffu);
      }
      largest = warp_max_unsigned(largest);
      const bool finite = largest < 0x7f800000u;
      const int exponent = fixed_point_exponent(finite ? largest : 0u, 30);
      double sum = 0.0;
      for (int i = 0; i < lane_channels; ++i) {
        const double x = finite ? rint(static_cast<double>(q[i]) * power_of_two(exponent)) : 0.0;
        storage.limbs[r][lane_id() + warp_threads * i] = to_limbs(static_cast<std::int32_t>(x));
        sum += x;
      }
      sum = warp_sum(sum);
      if (lane_id() != 0) continue;
      storage.unit[r] =
          finite ? static_cast<double>(scale) * power_of_two(-exponent) : static_cast<double>(nan_float());
      storage.sum[r] = sum;
    }
  }

  /// Takes the prepared queries into registers.
  __device__ explicit pack_key_scores(const temp_storage& storage) {
    using namespace packkv::detail;
    // The channels of register i of B are those that compute() has in register 2 i of A.
    const int row = lane_id() / 16, limb = lane_id() / 4 % 4, place = lane_id() % 4;
#pragma unroll
    for (int p = 0; p < passes; ++p)
#pragma unroll
      for (int j = 0; j < lane_channels; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          bytes16 x;
          for (int k = 0; k < 4; ++k)
            x.word[k] = storage.limbs[2 * p + row][group_codes::channel(j, 16 * i + k / 2 * 8 + 2 * place + k % 2)];
          query_[p][j][i] = gather_limb(x, limb);
        }
  }

  /// sums[p]: what the lane has of the group's sums of codes and of limbs of queries 2 p and 2 p + 1. All lanes take
  /// part, here and below.
  __device__ void compute(const group_codes& codes, std::int32_t (&sums)[passes][4]) const {
    using namespace packkv::detail;
#pragma unroll
    for (int p = 0; p < passes; ++p)
      for (int i = 0; i < 4; ++i) sums[p][i] = 0;
#pragma unroll
    for (int j = 0; j < lane_channels; ++j) {
      std::uint32_t m[4], a[4];
      ldmatrix_transposed(m, &codes.of[j][lane_id()]);
      // Of a channel a lane has bytes 2 g and 2 g + 1: rows g and g + 8 of A.
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        a[2 * i] = permute_bytes(m[2 * i], m[2 * i + 1], 0x6420);
        a[2 * i + 1] = permute_bytes(m[2 * i], m[2 * i + 1], 0x7531);
      }
#pragma unroll
      for (int p = 0; p < passes; ++p) mma_u8s8(sums[p], a, query_[p][j]);
    }
  }

  /// Of a warp, in shared memory: what compute() made of a tile, limbs joined in pairs, for another lane to finish.
  struct tile_sums {
    static constexpr int row_pairs = tile_tokens + 2;  ///< rows lie in different banks
    packkv::detail::bytes8 pair[Rows][row_pairs];
  };
  /// Keeps the sums of group g. The caller orders this before score().
  __device__ static void keep(tile_sums& to, int g, const std::int32_t (&sums)[passes][4]) {
    using namespace packkv::detail;
    // Limbs l and l + 1 together are below 2^15.01, codes below 2^8: sums of 256 channels stay below 2^31.
    const int which = lane_id() % 2,
              slot = pack_codes<HeadDim>::pack_size * g + group_codes::slot_of(lane_id() / 4 * 2);
#pragma unroll
    for (int p = 0; p < passes; ++p) {
      bytes8* const pair = to.pair[2 * p + lane_id() % 4 / 2] + slot;
      pair[0].word[which] = static_cast<std::uint32_t>(sums[p][0] + 256 * sums[p][1]);
      pair[group_codes::slot_of(1) - group_codes::slot_of(0)].word[which] =
          static_cast<std::uint32_t>(sums[p][2] + 256 * sums[p][3]);
    }
  }
  /// Scale times the score of query r against a slot of the tile.
  __device__ static float score(const temp_storage& storage, const tile_sums& sums, int r, int slot,
                                const pack_affine& step) {
    const packkv::detail::bytes8 pair = packkv::detail::load8(&sums.pair[r][slot]);
    const std::int64_t total =
        std::int64_t{static_cast<std::int32_t>(pair.word[1])} * 65536 + static_cast<std::int32_t>(pair.word[0]);
    return static_cast<float>(storage.unit[r] *
                              (step.scale * static_cast<double>(total) + step.offset * storage.sum[r]));
  }

 private:
  std::uint32_t query_[passes][lane_channels][2];
};

}  // namespace packkv::warp

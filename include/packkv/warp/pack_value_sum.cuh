// SPDX-License-Identifier: Apache-2.0
// Weighted sums of groups of 16 unpacked values for a few rows of weights, by products of bytes.
// One idea: weights times steps in fixed point are four signed bytes per slot, and their sums with codes are exact; the
// unit follows the largest weight so far, and sums become floats only when it changes.
//   pack_value_sum<128, 2> sum;   sum.weigh(shared, w, step, integer, rows);   __syncwarp();
//   for (g = 0; g < 4; ++g) sum.add(shared, g, codes);   sum.finish();   sum.write([&](r, c, x) { ... });
#pragma once

#include <packkv/codec/pack_quantize.hpp>
#include <packkv/detail/limbs.cuh>
#include <packkv/detail/matrix.cuh>
#include <packkv/warp/pack_codes.cuh>

namespace packkv::warp {

/// Rows rows of weights, an even number; two make one operand B.
template <int HeadDim, int Rows>
class pack_value_sum {
 public:
  static_assert(Rows > 0 && Rows % 2 == 0, "a product has columns for the limbs of two rows");
  using group_codes = pack_group_codes<HeadDim>;
  static constexpr int lane_channels = group_codes::lane_channels, passes = Rows / 2;

  /// Of a warp, in shared memory: the weights of a tile in limbs, the slots of a group in the order of codes.
  struct temp_storage {
    packkv::detail::bytes16 limbs[Rows][tile_tokens / 4];
  };

  __device__ pack_value_sum() {
#pragma unroll
    for (int p = 0; p < passes; ++p)
#pragma unroll
      for (int j = 0; j < lane_channels; ++j)
        for (int half = 0; half < 2; ++half) sum_[p][j][half] = 0.0f;
    for (int r = 0; r < Rows; ++r) exponent_[r] = no_exponent;
    clear();
  }

  /// Takes a tile's weights: w[j][r] of slot lane + 32 j and row r < rows, and the slot's step. A weight of 0 selects:
  /// what its slot holds does not count. A weight, or its product with the step, that is not finite makes the row NaN.
  /// The caller orders this before add(), and after that of the tile before. All lanes take part, here and below.
  __device__ void weigh(temp_storage& storage, const float (&w)[2][Rows], const pack_step (&step)[2], bool integer_zero,
                        int rows) {
    using namespace packkv::detail;
    float product[2][Rows];
    bool grows = tiles_ == most_tiles;
    int needed[Rows];
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      needed[r] = exponent_[r];
      if (r >= rows) continue;
      std::uint32_t largest = 0;
      for (int j = 0; j < 2; ++j) {
        // A scale of 0 or NaN: the slot is `low` everywhere.
        product[j][r] = w[j][r] != 0.0f && step[j].scale > 0.0f ? w[j][r] * step[j].scale : 0.0f;
        if (is_finite(product[j][r])) largest = max_of(largest, bit_cast<std::uint32_t>(product[j][r]) & 0x7fffffffu);
      }
      largest = warp_max_unsigned(largest);
      // Zeros need nothing, and leave a unit as it is.
      if (largest != 0) needed[r] = min_of(needed[r], fixed_point_exponent(largest, 30));
      grows = grows || needed[r] != exponent_[r];
    }
    if (grows) {
      flush();
#pragma unroll
      for (int r = 0; r < Rows; ++r)
        if (needed[r] != exponent_[r]) exponent_[r] = needed[r] - headroom;
    }
    ++tiles_;
    auto* const words = reinterpret_cast<std::uint32_t*>(storage.limbs);
#pragma unroll
    for (int r = 0; r < Rows; ++r)
      for (int j = 0; j < 2; ++j) {
        std::int32_t x = 0;
        if (r < rows && w[j][r] != 0.0f) {
          const int exponent = min_of(exponent_[r], most_exponent);
          const bool finite = is_finite(product[j][r]);
          // With the rounded product, so that codes that a zero point cancels do cancel.
          const double rounded = finite ? rint(static_cast<double>(product[j][r]) * power_of_two(exponent))
                                        : static_cast<double>(nan_float());
          if (finite) x = static_cast<std::int32_t>(rounded);
          constant_[r] +=
              integer_zero && step[j].scale > 0.0f
                  ? rounded * static_cast<double>(step[j].zero)
                  : static_cast<double>(w[j][r]) * static_cast<double>(step[j].low) * power_of_two(exponent) +
                        (finite ? 0.0 : rounded);
        }
        const int slot = lane_id() + warp_threads * j;
        words[r * tile_tokens + slot / 16 * 16 + group_codes::byte_of(slot % 16)] = to_limbs(x);
      }
  }

  /// Adds group `g` of the tile.
  __device__ void add(const temp_storage& storage, int g, const group_codes& codes) {
    using namespace packkv::detail;
    const int row = lane_id() / 16, limb = lane_id() / 4 % 4, place = lane_id() % 4;
    std::uint32_t b[passes][1];
#pragma unroll
    for (int p = 0; p < passes; ++p) b[p][0] = gather_limb(load16(&storage.limbs[2 * p + row][4 * g + place]), limb);
#pragma unroll
    for (int j = 0; j < lane_channels; ++j) {
      std::uint32_t m[4];
      ldmatrix(m, &codes.of[j][lane_id()]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const std::uint32_t a[2] = {m[2 * half], m[2 * half + 1]};
#pragma unroll
        for (int p = 0; p < passes; ++p) mma_u8s8(codes_[p][j][half], a, b[p]);
      }
    }
  }

  /// Adds NaN to the rows of which a slot of the tile counts.
  __device__ void add_nan(const float (&w)[2][Rows]) {
    tiles_ = max_of(tiles_, 1);
    for (int r = 0; r < Rows; ++r)
      if (w[0][r] != 0.0f || w[1][r] != 0.0f) constant_[r] = static_cast<double>(packkv::detail::nan_float());
  }

  /// Multiplies what has been added so far.
  __device__ void rescale(const float (&factor)[Rows]) {
    flush();
#pragma unroll
    for (int p = 0; p < passes; ++p)
#pragma unroll
      for (int j = 0; j < lane_channels; ++j)
        for (int half = 0; half < 2; ++half)
          sum_[p][j][half] *= packkv::detail::lane_id() % 4 / 2 == 0 ? factor[2 * p] : factor[2 * p + 1];
  }

  /// After the last tile, before write().
  __device__ void finish() { flush(); }

  /// sink(row, channel, sum) for what the lane has.
  template <class Sink>
  __device__ void write(Sink&& sink) const {
    using namespace packkv::detail;
#pragma unroll
    for (int p = 0; p < passes; ++p)
#pragma unroll
      for (int j = 0; j < lane_channels; ++j)
        for (int half = 0; half < 2; ++half)
          sink(2 * p + lane_id() % 4 / 2, group_codes::channel(j, 16 * half + lane_id() / 4 + lane_id() % 2 * 8),
               sum_[p][j][half]);
  }

 private:
  /// Sums of a limb and codes of 64 slots are below 2^21: this many tiles stay in 31 bits.
  static constexpr int most_tiles = 512;
  /// Bits that the largest weight may grow before the unit has to change.
  static constexpr int headroom = 4;
  static constexpr int no_exponent = 1000, most_exponent = 500;

  __device__ void clear() {
    tiles_ = 0;
    for (int r = 0; r < Rows; ++r) constant_[r] = 0.0;
#pragma unroll
    for (int p = 0; p < passes; ++p)
#pragma unroll
      for (int j = 0; j < lane_channels; ++j)
        for (int half = 0; half < 2; ++half)
          for (int i = 0; i < 4; ++i) codes_[p][j][half][i] = 0;
  }

  /// Turns the integers into floats.
  __device__ void flush() {
    using namespace packkv::detail;
    if (tiles_ > 0) {
#pragma unroll
      for (int p = 0; p < passes; ++p) {
        const double constant[2] = {warp_sum(constant_[2 * p]), warp_sum(constant_[2 * p + 1])};
        const bool second = lane_id() % 4 / 2 != 0;
        const double own = second ? constant[1] : constant[0];
        const double unit = power_of_two(-min_of(second ? exponent_[2 * p + 1] : exponent_[2 * p], most_exponent));
#pragma unroll
        for (int j = 0; j < lane_channels; ++j)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            sum_[p][j][half] +=
                static_cast<float>((static_cast<double>(total_of_limbs<false>(codes_[p][j][half])) + own) * unit);
      }
    }
    clear();
  }

  std::int32_t codes_[passes][lane_channels][2][4];  ///< sums of limbs and codes, in the unit of now
  float sum_[passes][lane_channels][2];              ///< of units before
  double constant_[Rows];                            ///< what does not depend on codes, in the unit of now, of the lane
  int exponent_[Rows];                               ///< the unit is 2^-exponent
  int tiles_;                                        ///< in codes_ and constant_
};

}  // namespace packkv::warp

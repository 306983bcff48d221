// SPDX-License-Identifier: Apache-2.0
// Weighted sums of groups of 16 unpacked values for a few rows of weights, by products of bytes.
// One idea: weights times steps in fixed point are four signed bytes per slot, and their sums with codes are exact; the
// unit follows the largest weight so far, and sums become floats only when it changes.
//   pack_value_sum<128, 2> sum(own);   sum.weigh(w, step, integer, rows);   __syncwarp();
//   for (g = 0; g < 4; ++g) sum.add(g, codes);   sum.finish();   x = own.sum[row][channel];
#pragma once

#include <packkv/codec/pack_quantize.hpp>
#include <packkv/detail/limbs.cuh>
#include <packkv/detail/matrix.cuh>
#include <packkv/warp/pack_codes.cuh>

namespace packkv::warp {

/// Rows rows of weights, an even number; two make one operand B. A row of sums has More floats of the caller's behind
/// it.
template <int HeadDim, int Rows, int More = 0>
class pack_value_sum {
 public:
  static_assert(Rows > 0 && Rows % 2 == 0, "a product has columns for the limbs of two rows");
  using group_codes = pack_group_codes<HeadDim>;
  static constexpr int lane_channels = group_codes::lane_channels, passes = Rows / 2;

  /// Of a warp, in shared memory: the weights of a tile in limbs, the slots of a group in the order of codes; and the
  /// sums of units before.
  struct temp_storage {
    packkv::detail::bytes16 limbs[Rows][tile_tokens / 4];
    float sum[Rows][HeadDim + More];
  };

  __device__ explicit pack_value_sum(temp_storage& storage) : storage_(storage) {
    for_sums([&](int r, int c, const std::int32_t(&)[4]) { storage_.sum[r][c] = 0.0f; });
    for (int r = 0; r < Rows; ++r) exponent_[r] = most_exponent;
    clear();
  }

  /// Takes a tile's weights: w[j][r] of slot lane + 32 j and row r < rows, and the slot's step. A weight of 0 selects:
  /// what its slot holds does not count. A weight, or its product with the step, that is not finite makes the row NaN;
  /// products below 2^-96 lose bits, those below 2^-126 count as 0. The caller orders this before add(), and after that
  /// of the tile before. All lanes take part, here and below.
  __device__ void weigh(const float (&w)[2][Rows], const pack_step (&step)[2], bool integer_zero, int rows) {
    using namespace packkv::detail;
    float product[2][Rows] = {};
    int needed[Rows];
    bool grows = tiles_ == most_tiles;
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      needed[r] = exponent_[r];
      if (r >= rows) continue;
      std::uint32_t largest = 0;
      for (int j = 0; j < 2; ++j) {
        // Without a scale (or with NaN) every element of the slot is `low`.
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
    auto* const words = reinterpret_cast<std::uint32_t*>(storage_.limbs);
    for (int j = 0; j < 2; ++j) {
      // In integers, so that codes that the zero point cancels do cancel. Otherwise what is added does not depend on
      // the product.
      const bool with_zero = integer_zero && step[j].scale > 0.0f;
      const double added = static_cast<double>(with_zero ? step[j].zero : step[j].low);
      const int slot = lane_id() + warp_threads * j, at = slot / 16 * 16 + group_codes::byte_of(slot % 16);
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        std::int32_t x = 0;
        if (r < rows && w[j][r] != 0.0f) {
          const bool finite = is_finite(product[j][r]);
          if (finite) x = static_cast<std::int32_t>(rintf(product[j][r] * bit_cast<float>((127 + exponent_[r]) << 23)));
          const double of_w = static_cast<double>(w[j][r]) * power_of_two(exponent_[r]);
          constant_[r] += added * (!finite     ? static_cast<double>(nan_float())
                                   : with_zero ? static_cast<double>(x)
                                               : of_w);
        }
        words[r * tile_tokens + at] = to_limbs(x);
      }
    }
  }

  /// Adds group `g` of the tile.
  __device__ void add(int g, const group_codes& codes) {
    using namespace packkv::detail;
    const int row = lane_id() / 16, limb = lane_id() / 4 % 4, place = lane_id() % 4;
    std::uint32_t b[passes][1];
#pragma unroll
    for (int p = 0; p < passes; ++p) b[p][0] = gather_limb(load16(&storage_.limbs[2 * p + row][4 * g + place]), limb);
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
    for_sums([&](int r, int c, const std::int32_t(&)[4]) {
#pragma unroll
      for (int i = 0; i < Rows; ++i)
        if (i == r) storage_.sum[r][c] *= factor[i];
    });
  }

  /// Adds sums of which a lane has channels lane, lane + 32, ...
  __device__ void add_channels(const float (&x)[Rows][lane_channels]) {
    using namespace packkv::detail;
    flush();
    __syncwarp();
#pragma unroll
    for (int r = 0; r < Rows; ++r)
#pragma unroll
      for (int i = 0; i < lane_channels; ++i) storage_.sum[r][lane_id() + warp_threads * i] += x[r][i];
    __syncwarp();
  }

  /// Completes storage.sum for all lanes. Nothing is added afterwards.
  __device__ void finish() {
    flush();
    __syncwarp();
  }

 private:
  /// Sums of a limb and codes of 64 slots are below 2^21: this many tiles stay in 31 bits.
  static constexpr int most_tiles = 512;
  /// Bits that the largest weight may grow before the unit has to change.
  static constexpr int headroom = 4;
  static constexpr int most_exponent = 126;  ///< that a float has

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

  /// f(row, channel, integers) for the sums that the lane owns: what total_of_limbs(integers) is of.
  template <class Function>
  __device__ void for_sums(Function&& f) const {
    using namespace packkv::detail;
#pragma unroll
    for (int p = 0; p < passes; ++p)
#pragma unroll
      for (int j = 0; j < lane_channels; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          f(2 * p + lane_id() % 4 / 2, group_codes::channel(j, 16 * half + lane_id() / 4 + lane_id() % 2 * 8),
            codes_[p][j][half]);
  }

  /// Turns the integers into floats.
  __device__ void flush() {
    using namespace packkv::detail;
    if (tiles_ > 0) {
#pragma unroll
      for (int r = 0; r < Rows; ++r) constant_[r] = warp_sum(constant_[r]);
      for_sums([&](int r, int c, const std::int32_t(&integers)[4]) {
        double constant = 0.0;
        int exponent = 0;
#pragma unroll
        for (int i = 0; i < Rows; ++i)
          if (i == r) {
            constant = constant_[i];
            exponent = exponent_[i];
          }
        storage_.sum[r][c] +=
            static_cast<float>((static_cast<double>(total_of_limbs(integers)) + constant) * power_of_two(-exponent));
      });
    }
    clear();
  }

  temp_storage& storage_;
  std::int32_t codes_[passes][lane_channels][2][4];  ///< sums of limbs and codes, in the unit of now
  double constant_[Rows];                            ///< what does not depend on codes, in the unit of now, of the lane
  int exponent_[Rows];                               ///< the unit is 2^-exponent
  int tiles_;                                        ///< in codes_ and constant_
};

}  // namespace packkv::warp

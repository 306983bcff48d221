// SPDX-License-Identifier: Apache-2.0
// Running softmax over tiles for the kernels that use matrix instructions, base 2.
// One idea: weights are relative to a maximum that may lag behind, so sums are rescaled only when a weight, or a weight
// times the row scale of its value, would leave the range of a half (docs/numerics.md, rules 3 and 4).
//   lazy_softmax<Sum, Rows> softmax;   softmax.weigh(s, value_rows, hidden, sum, p);   sum.add(tile, p);
#pragma once

#include <packkv/warp/mma_value_sum.cuh>

namespace packkv::warp {

/// Sum is an mma_value_sum of Rows rows.
template <class Sum, int Rows>
class lazy_softmax {
 public:
  using columns = score_columns<Rows>;
  static constexpr int lane_rows = columns::lane_rows;

  __device__ lazy_softmax() {
    for (int i = 0; i < lane_rows; ++i) {
      maximum_[i] = lowest;
      sum_[i] = 0.0f;
      zero_[i] = 0.0f;
    }
  }

  /// Turns the scores of a tile (base 2) and the row scales of its values into weights, and rescales `sum` if need be.
  /// Bit lane_rows * k + i of `hidden` is set where the lane's row i does not see its token k; what such a token has
  /// for a score or row scale, NaN included, does not reach the row. All lanes take part.
  __device__ void weigh(float (&s)[tokens_per_lane][lane_rows], detail::bytes16 rows, std::uint32_t hidden, Sum& sum,
                        value_operand<Rows>& p) {
    using namespace packkv::detail;
    if (__builtin_expect(hidden != 0, 0)) hide(hidden, s, rows);
    float top[lane_rows];
    bool rising = rises(s, top);
    std::uint32_t row[4];
    for (int t = 0; t < 4; ++t) row[t] = multiply_halves(rows.word[t], row_factor_);
    rising = rising || any_half_above(largest_of(row), 0x3c003c00u);
    if (__builtin_expect(__any_sync(all_lanes, rising) != 0, 0)) {
      raise(top, largest_of(rows.word), sum);
      for (int t = 0; t < 4; ++t) row[t] = multiply_halves(rows.word[t], row_factor_);
    }
    detail::for_constants<4>([&](auto index) {
      constexpr int t = decltype(index)::value, k0 = 2 * t, k1 = 2 * t + 1;
      if constexpr (columns::paired) {
        const std::uint32_t h = multiply_halves(pack_halves(weight<k0>(s[k0][0], 0), weight<k1>(s[k1][0], 0)), row[t]);
        const two_floats rounded = unpack_halves(h);
        count<k0>(rounded.low, 0);
        count<k1>(rounded.high, 0);
        p.set_paired(t, h);
      } else {
        const std::uint32_t row0 = half_twice<false>(row[t]), row1 = half_twice<true>(row[t]);
        for (int n = 0; n < columns::blocks; ++n) {
          const int i0 = 2 * n, i1 = 2 * n + 1;
          const std::uint32_t h0 =
              multiply_halves(pack_halves(weight<k0>(s[k0][i0], i0), weight<k0>(s[k0][i1], i1)), row0);
          const std::uint32_t h1 =
              multiply_halves(pack_halves(weight<k1>(s[k1][i0], i0), weight<k1>(s[k1][i1], i1)), row1);
          const two_floats low = unpack_halves(h0), high = unpack_halves(h1);
          count<k0>(low.low, i0);
          count<k0>(low.high, i1);
          count<k1>(high.low, i0);
          count<k1>(high.high, i1);
          p.b[t][n][0] = movmatrix(h0);
          p.b[t][n][1] = movmatrix(h1);
        }
      }
    });
  }

  /// What `sum` and the third result of `finish` are to be multiplied by.
  __device__ float row_unit() const { return row_unit(detail::unpack_halves(row_factor_).low); }
  /// Maximum, sum of weights, and sum of weights times row scales, of the lane's rows; the same in all lanes that
  /// have the row. All lanes take part.
  __device__ void finish(float (&maximum)[lane_rows], float (&sum)[lane_rows], float (&zero)[lane_rows]) const {
    constexpr float unit = passes::power_of_two(-Sum::power);
    for (int i = 0; i < lane_rows; ++i) {
      maximum[i] = maximum_[i];
      sum[i] = sum_[i];
      zero[i] = zero_[i];
      for (int m = 4; m < detail::warp_threads; m *= 2) {
        sum[i] += detail::shuffle_xor(sum[i], m);
        zero[i] += detail::shuffle_xor(zero[i], m);
      }
      sum[i] *= unit;
      zero[i] *= unit;
    }
  }

  /// What an empty row has for a maximum.
  static constexpr float lowest = -1e30f;

 protected:
  /// `top`: the highest of the lane's scores of each row; whether one is too far above the maximum.
  __device__ bool rises(const float (&s)[tokens_per_lane][lane_rows], float (&top)[lane_rows]) const {
    bool rising = false;
    for (int i = 0; i < lane_rows; ++i) {
      top[i] = fmaxf(fmaxf(fmaxf(s[0][i], s[1][i]), fmaxf(s[2][i], s[3][i])),
                     fmaxf(fmaxf(s[4][i], s[5][i]), fmaxf(s[6][i], s[7][i])));
      rising = rising || top[i] > maximum_[i] + static_cast<float>(Sum::headroom);
    }
    return rising;
  }

  /// A token's weight, in units of its place in the operand; it counts in the row's sum as it is.
  template <int K>
  __device__ float weight(float s, int i) {
    constexpr int fold = Sum::first_fold(K);
    const float x = detail::exp2_fast(s - (maximum_[i] - static_cast<float>(Sum::power - fold)));
    sum_[i] = fmaf(x, passes::power_of_two(fold), sum_[i]);
    return x;
  }
  template <int K>
  __device__ void count(float rounded, int i) {
    zero_[i] = fmaf(rounded, passes::power_of_two(Sum::first_fold(K)), zero_[i]);
  }

  /// Gives hidden tokens the score -inf, and the row scale 0 if none of the lane's rows sees them. A row scale that is
  /// no number would reach all of the lane's rows: it becomes 0, too, and the score NaN for the rows that see it.
  __device__ static void hide(std::uint32_t hidden, float (&s)[tokens_per_lane][lane_rows], detail::bytes16& rows) {
    constexpr std::uint32_t all = (1u << lane_rows) - 1;
    for (int k = 0; k < tokens_per_lane; ++k) {
      const std::uint32_t of_token = hidden >> (lane_rows * k) & all;
      std::uint32_t& row = rows.word[k / 2];
      const std::uint32_t half = row >> 16 * (k % 2) & 0xffffu;
      const bool finite = (half & 0x7c00u) != 0x7c00u;
      for (int i = 0; i < lane_rows; ++i) {
        if (of_token != 0 && !finite) s[k][i] = detail::nan_float();
        if ((of_token >> i & 1u) != 0) s[k][i] = -detail::infinity();
      }
      if (of_token == all || (of_token != 0 && !finite)) row &= k % 2 == 0 ? 0xffff0000u : 0x0000ffffu;
    }
  }

  /// For both halves.
  __device__ static std::uint32_t largest_of(const std::uint32_t (&x)[4]) {
    return detail::larger_halves(detail::larger_halves(x[0], x[1]), detail::larger_halves(x[2], x[3]));
  }

  __device__ void raise(float (&top)[lane_rows], std::uint32_t largest_rows, Sum& sum) {
    const detail::two_floats pair = detail::unpack_halves(largest_rows);
    const float ratio = raise_rows(fmaxf(pair.low, pair.high));
    float factor[lane_rows];
    raise_maxima(top, factor);
    for (int i = 0; i < lane_rows; ++i) {
      factor[i] *= ratio;
      zero_[i] *= factor[i];
    }
    sum.rescale(factor);
  }
  /// Makes row scales up to `row` at most 1; returns what sums that have them are to be multiplied by.
  __device__ float raise_rows(float row) {
    using namespace packkv::detail;
    row = fmaxf(row, 0.0f);
    for (int m = 4; m < warp_threads; m *= 2) row = fmaxf(row, shuffle_xor(row, m));
    // 2^-e for the smallest e for which no row scale exceeds 2^e, within -15..16, and no larger than before.
    const int e = static_cast<int>((bit_cast<std::uint32_t>(row) + 0x7fffffu) >> 23) - 127;
    const float before = unpack_halves(row_factor_).low;
    const float after =
        fminf(before, bit_cast<float>(static_cast<std::uint32_t>(127 - max_of(min_of(e, 16), -15)) << 23));
    row_factor_ = pack_halves(after, after);
    return after * row_unit(before);
  }
  /// Raises the maxima to `top`, the highest score of a tile; sums are to be multiplied by `factor`.
  __device__ void raise_maxima(float (&top)[lane_rows], float (&factor)[lane_rows]) {
    for (int i = 0; i < lane_rows; ++i) {
      for (int m = 4; m < detail::warp_threads; m *= 2) top[i] = fmaxf(top[i], detail::shuffle_xor(top[i], m));
      const float maximum = fmaxf(maximum_[i], top[i]);
      factor[i] = detail::exp2_fast(maximum_[i] - maximum);
      maximum_[i] = maximum;
      sum_[i] *= factor[i];
    }
  }
  /// 1 / factor, for a power of two.
  __device__ static float row_unit(float factor) {
    return detail::bit_cast<float>((254u << 23) - detail::bit_cast<std::uint32_t>(factor));
  }

  std::uint32_t row_factor_ = 0x78007800;  ///< for row scales, so that they are at most 1: a power of two, twice
  float maximum_[lane_rows], sum_[lane_rows], zero_[lane_rows];
};

}  // namespace packkv::warp

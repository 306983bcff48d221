// SPDX-License-Identifier: Apache-2.0
// Running softmax over tiles for the kernels that use matrix instructions, base 2.
// One idea: weights are relative to a maximum that may lag behind, so sums are rescaled only when a weight would leave
// the range of a half. The maximum is over score + log2(row scale of V), what is summed are the rounded weights
// (docs/numerics.md, rules 3 and 4).
//   lazy_softmax<Sum, Rows> softmax;   softmax.weigh(s, value_rows, hidden, sum, p);   sum.add(tile, p);
#pragma once

#include <packkv/warp/mma_value_sum.cuh>

namespace packkv::warp {

/// Smallest row scale of V that counts; smaller ones, 0 included, are taken as this: the smallest half.
inline constexpr float smallest_row = 0x1p-24f;

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
  __device__ void weigh(float (&s)[tokens_per_lane][lane_rows], const detail::bytes16& rows, std::uint32_t hidden,
                        Sum& sum, value_operand<Rows>& p) {
    using namespace packkv::detail;
    float top[lane_rows], row[tokens_per_lane], log_row[tokens_per_lane], inverse[tokens_per_lane];
    unpack_rows(rows, row);
    const bool weak = has_weak(rows);
    if (weak)
      for (int k = 0; k < tokens_per_lane; ++k) row[k] = at_least(row[k], smallest_row);
    detail::for_constants<tokens_per_lane>([&](auto index) {
      constexpr int k = decltype(index)::value;
      log_row[k] = log2_fast(row[k]);
      inverse[k] = exp2_fast(static_cast<float>(Sum::first_fold(k)) - log_row[k]);
      for (int i = 0; i < lane_rows; ++i) s[k][i] += log_row[k];
    });
    if (hidden != 0)
      for (int k = 0; k < tokens_per_lane; ++k) {
        if (!(inverse[k] < infinity())) inverse[k] = 0.0f;  // a row scale that is no number, perhaps of no token
        for (int i = 0; i < lane_rows; ++i)
          if ((hidden >> (lane_rows * k + i) & 1u) != 0) s[k][i] = -infinity();
      }
    for (int i = 0; i < lane_rows; ++i) top[i] = maximum_[i];
    for (int k = 0; k < tokens_per_lane; ++k)
      for (int i = 0; i < lane_rows; ++i) top[i] = fmaxf(top[i], s[k][i]);
    bool rising = false;
    for (int i = 0; i < lane_rows; ++i) rising = rising || top[i] > maximum_[i] + static_cast<float>(Sum::headroom);
    if (__any_sync(all_lanes, rising) != 0) raise(top, sum);
    if (weak) count_weak(s, row, log_row, inverse);
    detail::for_constants<4>([&](auto index) {
      constexpr int t = decltype(index)::value, k0 = 2 * t, k1 = 2 * t + 1;
      if constexpr (columns::paired) {
        const std::uint32_t h = pack_halves(weight<k0>(s[k0][0], 0), weight<k1>(s[k1][0], 0));
        const two_floats rounded = unpack_halves(h);
        count<k0>(rounded.low, inverse, 0);
        count<k1>(rounded.high, inverse, 0);
        // Lane 4 * c + p has column c: row c / 2, and the tokens of one half of 16 by c's parity.
        const std::uint32_t x = movmatrix(h);
        const bool odd = (lane_id() / 4) % 2 != 0;
        p.b[t][0][0] = odd ? 0u : x;
        p.b[t][0][1] = odd ? x : 0u;
      } else {
        for (int n = 0; n < columns::blocks; ++n) {
          const std::uint32_t h0 =
              pack_halves(weight<k0>(s[k0][2 * n], 2 * n), weight<k0>(s[k0][2 * n + 1], 2 * n + 1));
          const std::uint32_t h1 =
              pack_halves(weight<k1>(s[k1][2 * n], 2 * n), weight<k1>(s[k1][2 * n + 1], 2 * n + 1));
          const two_floats low = unpack_halves(h0), high = unpack_halves(h1);
          count<k0>(low.low, inverse, 2 * n);
          count<k0>(low.high, inverse, 2 * n + 1);
          count<k1>(high.low, inverse, 2 * n);
          count<k1>(high.high, inverse, 2 * n + 1);
          p.b[t][n][0] = movmatrix(h0);
          p.b[t][n][1] = movmatrix(h1);
        }
      }
    });
  }

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

 private:
  template <int K>
  __device__ float weight(float s, int i) const {
    return detail::exp2_fast(s - (maximum_[i] - static_cast<float>(Sum::power - Sum::first_fold(K))));
  }
  template <int K>
  __device__ void count(float rounded, const float (&inverse)[tokens_per_lane], int i) {
    sum_[i] = fmaf(rounded, inverse[K], sum_[i]);
    zero_[i] = fmaf(rounded, passes::power_of_two(Sum::first_fold(K)), zero_[i]);
  }

  /// Row scales below the normal halves: such a weight times its row scale may round to nothing while the weight itself
  /// does not, so these weights are counted as they are.
  __device__ static bool has_weak(const detail::bytes16& rows) {
    std::uint32_t least = rows.word[0];
    for (int i = 1; i < 4; ++i) least = detail::smaller_halves(least, rows.word[i]);
    return (least & 0x7c00u) == 0 || (least & 0x7c000000u) == 0;
  }
  __device__ void count_weak(const float (&s)[tokens_per_lane][lane_rows], const float (&row)[tokens_per_lane],
                             const float (&log_row)[tokens_per_lane], float (&inverse)[tokens_per_lane]) {
    detail::for_constants<tokens_per_lane>([&](auto index) {
      constexpr int k = decltype(index)::value;
      if (row[k] < 0x1p-14f) {
        const float back = log_row[k] - static_cast<float>(Sum::power);
        for (int i = 0; i < lane_rows; ++i) sum_[i] += detail::exp2_fast(s[k][i] - back - maximum_[i]);
        inverse[k] = 0.0f;
      }
    });
  }

  __device__ void raise(float (&top)[lane_rows], Sum& sum) {
    using namespace packkv::detail;
    float factor[lane_rows];
    for (int i = 0; i < lane_rows; ++i) {
      for (int m = 4; m < warp_threads; m *= 2) top[i] = fmaxf(top[i], shuffle_xor(top[i], m));
      factor[i] = exp2_fast(maximum_[i] - top[i]);
      maximum_[i] = top[i];
      sum_[i] *= factor[i];
      zero_[i] *= factor[i];
    }
    sum.rescale(factor);
  }

  float maximum_[lane_rows], sum_[lane_rows], zero_[lane_rows];
};

}  // namespace packkv::warp

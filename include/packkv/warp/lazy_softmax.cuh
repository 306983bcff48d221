// SPDX-License-Identifier: Apache-2.0
// Running softmax over tiles for the kernels that use matrix instructions, base 2.
// One idea: weights are relative to a maximum that may lag behind, so sums are rescaled only when a weight, or a weight
// times the row scale of its value, would leave the range of a half (docs/numerics.md, rules 3 and 4). Scores come less
// that maximum, which costs nothing where they are made.
// For classes that are one and have sums of values, too:
//   keys.compute(key_tile, output.reference(), s);   output.add(value_tile, s, hidden), in which
//   if (__any_sync(all_lanes, this->rises(s))) this->raise_maxima(s, factor);   this->weigh(s);
#pragma once

#include <packkv/warp/mma_value_sum.cuh>

namespace packkv::warp {

/// Sum is an mma_value_sum of Rows rows.
template <class Sum, int Rows>
class lazy_softmax {
 public:
  /// Rows of a lane.
  static constexpr int lane_rows = score_columns<Rows>::lane_rows;
  /// A lane's scores of a tile: of its token k and its row i.
  using scores = float[tokens_per_lane][lane_rows];

  /// What scores of the lane's rows must be less by when they come here.
  __device__ const float (&reference() const)[lane_rows] { return reference_; }

  /// What an empty row has for a maximum.
  static constexpr float lowest = -1e30f;

 protected:
  __device__ lazy_softmax() {
    for (int i = 0; i < lane_rows; ++i) {
      reference_[i] = 0.0f;
      sum_[i] = 0.0f;
    }
  }

  /// Whether no row has seen a token: all sums are 0.
  __device__ bool empty() const { return empty_ == all; }
  /// Whether a score is too far above the maximum, or a row has none yet. NaN may count as too far.
  __device__ bool rises(const scores& s) const {
    // Above 0 floats compare as integers do, three of which are compared at once.
    const auto bits = [](float x) { return detail::bit_cast<std::int32_t>(x); };
    constexpr float limit = Sum::headroom + Sum::weight_power;
    std::int32_t top = bits(s[0][0]);
    for (int i = 0; i < lane_rows; ++i)
      for (int k = 0; k < tokens_per_lane; k += 2) top = max_of(top, max_of(bits(s[k][i]), bits(s[k + 1][i])));
    return top > bits(limit) || empty_ != 0;
  }
  /// Raises the maxima to the highest scores of a tile, which become less; sums are to be multiplied by `factor`. A row
  /// that sees no token stays empty. All lanes take part.
  __device__ void raise_maxima(scores& s, float (&factor)[lane_rows]) {
    for (int i = 0; i < lane_rows; ++i) {
      float top = s[0][i];
      for (int k = 1; k < tokens_per_lane; ++k) top = fmaxf(top, s[k][i]);
      for (int m = 4; m < detail::warp_threads; m *= 2) top = fmaxf(top, detail::shuffle_xor(top, m));
      const bool first = (empty_ >> i & 1u) != 0;
      float up = top - static_cast<float>(Sum::weight_power);
      if (!first) up = fmaxf(up, 0.0f);
      if (top == -detail::infinity())
        up = 0.0f;
      else
        empty_ &= ~(1u << i);
      factor[i] = first ? 1.0f : detail::exp2_fast(-up);
      reference_[i] += up;
      sum_[i] *= factor[i];
      for (int k = 0; k < tokens_per_lane; ++k) s[k][i] -= up;
    }
  }
  /// Scores become weights times 2^weight_power, at most 2^headroom of these, and count in the rows' sums.
  __device__ void weigh(scores& s) {
    for (auto& token : s)
      for (int i = 0; i < lane_rows; ++i) {
        token[i] = detail::exp2_fast(token[i]);
        sum_[i] += token[i];
      }
  }

  /// Whether a row scale is more than 1 when it is multiplied as it was told by raise_rows; `largest`: for both halves.
  __device__ bool rows_rise(std::uint32_t largest) const {
    return detail::any_half_above(detail::multiply_halves(largest, row_factor_), 0x3c003c00u);
  }
  /// Makes row scales up to `row` at most 1; returns what sums that have them are to be multiplied by.
  __device__ float raise_rows(float row) {
    using namespace packkv::detail;
    row = fmaxf(row, 0.0f);
    for (int m = 4; m < warp_threads; m *= 2) row = fmaxf(row, shuffle_xor(row, m));
    // 2^-e for the smallest e for which no row scale exceeds 2^e, within a range that leaves room for row_factor's
    // folds, and no larger than before.
    const int e = static_cast<int>((bit_cast<std::uint32_t>(row) + 0x7fffffu) >> 23) - 127;
    const float before = unpack_halves(row_factor_).low;
    const float after =
        fminf(before, bit_cast<float>(static_cast<std::uint32_t>(127 - max_of(min_of(e, 16), Sum::lift - 15)) << 23));
    row_factor_ = pack_halves(after, after);
    return after * inverse(before);
  }
  /// What row scales of a tile's tokens 16 * T on are multiplied by, for both halves: a power of two each.
  template <int T>
  __device__ std::uint32_t row_factor() const {
    constexpr float low = passes::power_of_two(Sum::lift - Sum::first_fold(2 * T));
    constexpr float high = passes::power_of_two(Sum::lift - Sum::first_fold(2 * T + 1));
    return detail::multiply_halves(row_factor_, detail::pack_halves(low, high));
  }
  /// What sums that have row scales are to be multiplied by, but for the powers of two of weights and folds.
  __device__ float row_unit() const { return inverse(detail::unpack_halves(row_factor_).low); }

  /// Maximum and sum of weights of the lane's rows, the same in all lanes that have the row. All lanes take part.
  __device__ void finish(float (&maximum)[lane_rows], float (&sum)[lane_rows]) const {
    for (int i = 0; i < lane_rows; ++i) {
      maximum[i] = (empty_ >> i & 1u) != 0 ? lowest : reference_[i] + static_cast<float>(Sum::weight_power);
      sum[i] = sum_[i];
      for (int m = 4; m < detail::warp_threads; m *= 2) sum[i] += detail::shuffle_xor(sum[i], m);
      sum[i] *= passes::power_of_two(-Sum::weight_power);
    }
  }

 private:
  /// 1 / factor, for a power of two.
  __device__ static float inverse(float factor) {
    return detail::bit_cast<float>((254u << 23) - detail::bit_cast<std::uint32_t>(factor));
  }

  static constexpr std::uint32_t all = (1u << lane_rows) - 1;
  std::uint32_t empty_ = all;              ///< bit i: no token of the lane's row i has been seen
  std::uint32_t row_factor_ = 0x78007800;  ///< for row scales, so that they are at most 1: a power of two, twice
  float reference_[lane_rows];             ///< maxima, less weight_power
  float sum_[lane_rows];
};

}  // namespace packkv::warp

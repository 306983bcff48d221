// SPDX-License-Identifier: Apache-2.0
// Softmax and weighted sums of tiles whose values are grouped along channels, for up to 16 query rows.
// One idea: a group's step belongs to a token, so weights times ranges are the operand of the group's channels; where
// the middles of the ranges lie is summed beside, from the rounded operand as well (docs/numerics.md, rule 4).
//   grouped_output<Codec, Rows> output;   keys.compute(key_tile, output.reference(), s);
//   output.add(tile, s, hidden);   output.finish(maximum, total, sink);
#pragma once

#include <packkv/warp/lane_numbers.cuh>
#include <packkv/warp/lazy_softmax.cuh>

namespace packkv::warp {

/// Codec is a static grouped_value_codec.
template <class Codec, int Rows>
class grouped_output : public lazy_softmax<mma_value_sum<Codec, Rows>, Rows> {
 public:
  using values = mma_value_sum<Codec, Rows>;
  static constexpr codec_spec spec = Codec::spec();
  using columns = score_columns<Rows>;
  static constexpr int lane_rows = columns::lane_rows;
  using scores = typename lazy_softmax<values, Rows>::scores;

  __device__ grouped_output() {
    for (auto& group : middles_)
      for (float& x : group) x = 0.0f;
  }

  /// Adds a tile with the scores s (base 2), which are less by reference() and become weights. Bit lane_rows * k + i of
  /// `hidden` is set where the lane's row i does not see its token k; what such a token holds, NaN included, does not
  /// reach the row. All lanes take part.
  __device__ void add(const std::uint8_t* tile, scores& s, std::uint32_t hidden) {
    using namespace packkv::detail;
    const std::uint32_t dropped = hidden != 0 ? hide(hidden, tile, s) : 0u;
    const bool rising = this->rises(s) || this->rows_rise(largest_range(tile, dropped));
    if (__any_sync(all_lanes, rising) != 0) raise(s, largest_range(tile, dropped));
    this->weigh(s);
    // Both terms see rounded weights: of equal weights the rounding would not average out of their difference.
    for (int k = 0; k < tokens_per_lane; k += 2)
      for (int i = 0; i < lane_rows; ++i) {
        const two_floats rounded = unpack_halves(pack_halves(s[k][i], s[k + 1][i]));
        s[k][i] = rounded.low;
        s[k + 1][i] = rounded.high;
      }
    const float inverse = this->row_unit();
    for_constants<groups>([&](auto index) {
      constexpr int g = decltype(index)::value;
      const numbers n(tile, g, dropped);
      value_operand<Rows> p;
      for_constants<4>([&](auto quarter) {
        constexpr int t = decltype(quarter)::value;
        const two_floats least = unpack_halves(n.minimum.word[t]), most = unpack_halves(n.maximum.word[t]);
        add_middle(s[2 * t], least.low + most.low, middles_[g]);
        add_middle(s[2 * t + 1], least.high + most.high, middles_[g]);
        set_operand<t>(s[2 * t], s[2 * t + 1], n.range(t, half_of(this->template row_factor<t>())), inverse, p,
                       middles_[g]);
      });
      sum_.template add<g * strips, strips>(tile, p);
    });
  }

  /// Maximum and sum of weights of the lane's rows, the same in all lanes that have the row; sink(row, channel, x) gets
  /// the lane's part of the sums. All lanes take part.
  template <class Sink>
  __device__ void finish(float (&maximum)[lane_rows], float (&total)[lane_rows], Sink&& sink) const {
    float middles[groups][lane_rows];
    base::finish(maximum, total);
    for (int g = 0; g < groups; ++g)
      for (int i = 0; i < lane_rows; ++i) {
        middles[g][i] = middles_[g][i];
        for (int m = 4; m < detail::warp_threads; m *= 2) middles[g][i] += detail::shuffle_xor(middles[g][i], m);
        middles[g][i] *= passes::power_of_two(-values::weight_power);
      }
    const float unit =
        this->row_unit() * (2.0f * values::sum_unit / static_cast<float>((1 << spec.strips.width[0]) - 1));
    sum_.each_strip([&](auto strip, int i, int channel, float x) {
      sink(columns::row(i), channel, fmaf(x, unit, middles[decltype(strip)::value / strips][i]));
    });
  }

 private:
  using base = lazy_softmax<values, Rows>;
  static constexpr int groups = spec.head_dim / spec.group, strips = spec.group / 16;  ///< strips of a group
  static constexpr std::uint32_t half_and_half = 0x38003800;

  /// Those of tokens of which a bit in `dropped` is set are 0.
  struct numbers : lane_numbers<Codec> {
    __device__ numbers(const std::uint8_t* tile, int g, std::uint32_t dropped) : lane_numbers<Codec>(tile, g) {
      this->drop(dropped);
    }
    /// (maximum - minimum) * unit of the tokens 2 * t and 2 * t + 1 of the lane; unit: a power of two, twice.
    __device__ std::uint32_t range(int t, std::uint32_t unit) const {
      return detail::multiply_add_halves(this->maximum.word[t], unit,
                                         detail::multiply_halves(this->minimum.word[t], unit ^ 0x80008000u));
    }
  };

  /// Half of two powers of two; all of a range may be beyond a half.
  __device__ static std::uint32_t half_of(std::uint32_t factors) {
    return detail::multiply_halves(factors, half_and_half);
  }

  /// Of half the ranges, for both halves, over all groups.
  __device__ static std::uint32_t largest_range(const std::uint8_t* tile, std::uint32_t dropped) {
    std::uint32_t largest = 0;
    for (int g = 0; g < groups; ++g) {
      const numbers n(tile, g, dropped);
      for (int t = 0; t < 4; ++t) largest = detail::larger_halves(largest, n.range(t, half_and_half));
    }
    return largest;
  }

  /// Gives hidden tokens the score -inf. Returns which tokens are to be read as 0: those that none of the lane's rows
  /// sees, and those that some of them see and that are no numbers; the rows that see these get the score NaN.
  __device__ static std::uint32_t hide(std::uint32_t hidden, const std::uint8_t* tile, scores& s) {
    constexpr std::uint32_t all = (1u << lane_rows) - 1;
    std::uint32_t dropped = 0, strange = 0;
    for (int g = 0; g < groups; ++g) {
      const numbers n(tile, g, 0);
      for (int k = 0; k < tokens_per_lane; ++k)
        for (const detail::bytes16& x : {n.maximum, n.minimum})
          strange |= (x.word[k / 2] >> 16 * (k % 2) & 0x7c00u) == 0x7c00u ? 1u << k : 0u;
    }
    for (int k = 0; k < tokens_per_lane; ++k) {
      const std::uint32_t of_token = hidden >> (lane_rows * k) & all;
      const bool drop = of_token == all || (of_token != 0 && (strange >> k & 1u) != 0);
      dropped |= drop ? 1u << k : 0u;
      for (int i = 0; i < lane_rows; ++i) {
        if (drop) s[k][i] = detail::nan_float();
        if ((of_token >> i & 1u) != 0) s[k][i] = -detail::infinity();
      }
    }
    return dropped;
  }

  __device__ void raise(scores& s, std::uint32_t largest_half_ranges) {
    const detail::two_floats pair = detail::unpack_halves(largest_half_ranges);
    const float ratio = this->raise_rows(fmaxf(pair.low, pair.high));
    const bool empty = this->empty();
    float factor[lane_rows];
    this->raise_maxima(s, factor);
    if (empty) return;
    for (int i = 0; i < lane_rows; ++i) {
      for (auto& group : middles_) group[i] *= factor[i];
      factor[i] *= ratio;
    }
    sum_.rescale(factor);
  }

  /// Half of `ends`, the middle of a range, for the weights w of a token.
  __device__ static void add_middle(const float (&w)[lane_rows], float ends, float (&sum)[lane_rows]) {
    for (int i = 0; i < lane_rows; ++i) sum[i] = fmaf(w[i], 0.5f * ends, sum[i]);
  }
  /// Codes count from the middle of their range: half a range less for every weight times range, as it was rounded.
  template <int K>
  __device__ static void take_half(float rounded, float inverse, float& sum) {
    sum = fmaf(rounded, inverse * -passes::power_of_two(values::first_fold(K) - values::lift), sum);
  }

  /// Weights w0 and w1 times ranges of the tokens 16 * T on; `inverse`: of what ranges are multiplied by.
  template <int T>
  __device__ static void set_operand(const float (&w0)[lane_rows], const float (&w1)[lane_rows], std::uint32_t range,
                                     float inverse, value_operand<Rows>& p, float (&sum)[lane_rows]) {
    using namespace packkv::detail;
    constexpr int k0 = 2 * T, k1 = 2 * T + 1;
    if constexpr (columns::paired) {
      const std::uint32_t h = multiply_halves(pack_halves(w0[0], w1[0]), range);
      const two_floats rounded = unpack_halves(h);
      take_half<k0>(rounded.low, inverse, sum[0]);
      take_half<k1>(rounded.high, inverse, sum[0]);
      p.set_paired(T, h);
    } else {
      const std::uint32_t range0 = half_twice<false>(range), range1 = half_twice<true>(range);
      for (int n = 0; n < columns::blocks; ++n) {
        const int i0 = 2 * n, i1 = 2 * n + 1;
        const std::uint32_t h0 = multiply_halves(pack_halves(w0[i0], w0[i1]), range0);
        const std::uint32_t h1 = multiply_halves(pack_halves(w1[i0], w1[i1]), range1);
        const two_floats low = unpack_halves(h0), high = unpack_halves(h1);
        take_half<k0>(low.low, inverse, sum[i0]);
        take_half<k0>(low.high, inverse, sum[i1]);
        take_half<k1>(high.low, inverse, sum[i0]);
        take_half<k1>(high.high, inverse, sum[i1]);
        p.b[T][n][0] = movmatrix(h0);
        p.b[T][n][1] = movmatrix(h1);
      }
    }
  }

  values sum_;
  float middles_[groups][lane_rows];  ///< what codes of 0 stand for, times weights, in the units of lazy_softmax
};

}  // namespace packkv::warp

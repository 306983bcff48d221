// SPDX-License-Identifier: Apache-2.0
// Softmax and weighted sums of coded tiles together: what a warp of the decode kernel has of its rows.
// One idea: what the operand of weights times row scales adds up to is a product of it with powers of two, so that what
// tensor cores cut off is cut off here, too.
//   value_output_of<Codec, Rows> output;   keys.compute(key_tile, output.reference(), s);
//   output.add(tile, s, hidden);   output.finish(maximum, weights, sink);
#pragma once

#include <packkv/warp/grouped_output.cuh>

namespace packkv::warp {

/// Codec is a static value_codec.
template <class Codec, int Rows>
class plan_output : public lazy_softmax<mma_value_sum<Codec, Rows>, Rows> {
 public:
  using values = mma_value_sum<Codec, Rows>;
  using columns = score_columns<Rows>;
  static constexpr int lane_rows = columns::lane_rows;
  using scores = typename lazy_softmax<values, Rows>::scores;

  /// As grouped_output's.
  __device__ void add(const std::uint8_t* tile, scores& s, std::uint32_t hidden) {
    using namespace packkv::detail;
    bytes16 rows = load_rows(tile + values::code_bytes);
    if (__builtin_expect(hidden != 0, 0)) hide(hidden, s, rows);
    std::uint32_t largest = rows.word[0];
    for (int t = 1; t < 4; ++t) largest = larger_halves(largest, rows.word[t]);
    const bool rising = this->rises(s) || this->rows_rise(largest);
    if (__builtin_expect(__any_sync(all_lanes, rising) != 0, 0)) raise(s, largest);
    this->weigh(s);
    value_operand<Rows> p;
    for_constants<4>([&](auto index) {
      constexpr int t = decltype(index)::value, k0 = 2 * t, k1 = 2 * t + 1;
      const std::uint32_t row = multiply_halves(rows.word[t], this->template row_factor<t>());
      if constexpr (columns::paired) {
        p.set_paired(t, multiply_halves(pack_halves(s[k0][0], s[k1][0]), row));
      } else {
        const std::uint32_t row0 = half_twice<false>(row), row1 = half_twice<true>(row);
        for (int n = 0; n < columns::blocks; ++n) {
          p.b[t][n][0] = movmatrix(multiply_halves(pack_halves(s[k0][2 * n], s[k0][2 * n + 1]), row0));
          p.b[t][n][1] = movmatrix(multiply_halves(pack_halves(s[k1][2 * n], s[k1][2 * n + 1]), row1));
        }
      }
    });
    total_.add(p);
    sum_.add(tile, p);
  }
  template <class Sink>
  __device__ void finish(float (&maximum)[lane_rows], float (&weights)[lane_rows], Sink&& sink) const {
    base::finish(maximum, weights);
    float total[lane_rows];
    total_.get(total);
    const float unit = this->row_unit();
    sum_.each(total, [&](int row, int channel, float x) { sink(row, channel, x * unit); });
  }

 private:
  using base = lazy_softmax<values, Rows>;

  /// Gives hidden tokens the score -inf, and the row scale 0 if none of the lane's rows sees them. A row scale that is
  /// no number would reach all of the lane's rows: it becomes 0, too, and the score NaN for the rows that see it.
  __device__ static void hide(std::uint32_t hidden, scores& s, detail::bytes16& rows) {
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

  __device__ void raise(scores& s, std::uint32_t largest_rows) {
    const detail::two_floats pair = detail::unpack_halves(largest_rows);
    const float ratio = this->raise_rows(fmaxf(pair.low, pair.high));
    const bool empty = this->empty();
    float factor[lane_rows];
    this->raise_maxima(s, factor);
    if (empty) return;
    for (float& x : factor) x *= ratio;
    total_.rescale(factor);
    sum_.rescale(factor);
  }

  values sum_;
  operand_total<values, Rows> total_;
};

/// The output of a codec's tiles.
template <class Codec, int Rows>
using value_output_of = std::conditional_t<Codec::spec().kind == codec_kind::grouped, grouped_output<Codec, Rows>,
                                           plan_output<Codec, Rows>>;

}  // namespace packkv::warp

// SPDX-License-Identifier: Apache-2.0
// Weights of any size as the operand of mma_value_sum, and where they come from.
// One idea: weights times row scales are divided by a power of two of each row, which only grows, and by so much that
// sums are seldom rescaled; what is summed are the rounded weights, so that only their rounding is lost.
//   weight_source<Rows> from(weights, b, first_head, rows, first, step, length);   from.load();   from.get(w);
//   scaled_weights<Sum, Rows> scale;   scale.weigh(w, value_rows, sum, p);   sum.add(tile, p);
#pragma once

#include <packkv/core/views.hpp>
#include <packkv/warp/mma_value_sum.cuh>

namespace packkv::warp {

/// Weights [batch, query_heads, tokens] of any type, a tile ahead in registers.
template <int Rows>
class weight_source {
 public:
  using columns = score_columns<Rows>;
  static constexpr int lane_rows = columns::lane_rows;

  /// Of the rows first_head .. first_head + rows - 1 of sequence b, tokens below `length`, from token `first` on, every
  /// `step` tokens a tile.
  __device__ weight_source(const input_view<3>& in, std::int64_t b, std::int64_t first_head, int rows,
                           std::int64_t first, int step, int length)
      : wide_(in.type == dtype::float32),
        halves_(in.type == dtype::float16),
        stride_(in.stride[2]),
        advance_(step * in.stride[2]),
        rows_(rows),
        step_(step),
        left_(static_cast<int>(length - first) - columns::first_token()) {
    for (int i = 0; i < lane_rows; ++i)
      from_[i] = static_cast<const char*>(
          detail::address(in, b, first_head + min_of(columns::row(i), rows - 1), first + columns::first_token()));
  }

  /// Starts to load the weights of the next tile.
  __device__ void load() {
    if (wide_)
      each([](const char* p) { return *reinterpret_cast<const std::uint32_t*>(p); });
    else
      each([](const char* p) { return std::uint32_t{*reinterpret_cast<const std::uint16_t*>(p)}; });
  }
  /// w[k][i] = weight of the lane's token k and row i; 0 beyond the length and in rows that do not exist.
  __device__ void get(float (&w)[columns::lane_tokens][lane_rows]) const {
    const int shift = wide_ ? 0 : 16;
    for (int k = 0; k < columns::lane_tokens; ++k)
      for (int i = 0; i < lane_rows; ++i) w[k][i] = detail::bit_cast<float>(bits_[k][i] << shift);
    if (halves_)
      for (int k = 0; k < columns::lane_tokens; ++k)
        for (int i = 0; i < lane_rows; ++i) w[k][i] = detail::unpack_halves(bits_[k][i]).low;
  }

 private:
  template <class Load>
  __device__ void each(Load&& load_bits) {
    for (int i = 0; i < lane_rows; ++i) {
      const char* p = from_[i];
      from_[i] += advance_;
      const int visible = columns::row(i) < rows_ ? left_ : 0;
      for (int k = 0; k < columns::lane_tokens; ++k, p += columns::token_step * stride_)
        bits_[k][i] = columns::token_step * k < visible ? load_bits(p) : 0u;
    }
    left_ -= step_;
  }

  bool wide_, halves_;
  std::int64_t stride_, advance_;  ///< bytes between tokens, and between tiles
  int rows_, step_;
  int left_;                     ///< tokens from the lane's first one of the next tile on
  const char* from_[lane_rows];  ///< that one's weights
  std::uint32_t bits_[columns::lane_tokens][lane_rows];
};

/// Sum is an mma_value_sum of Rows rows. Each weight times row scale is rounded to a half: by at most 2^-11 of itself,
/// or 2^-22 of the row's largest so far where that is more. Weights of 0 select: what their tokens hold, NaN included,
/// does not reach the row. A weight that is not finite makes all of its row's sums not finite.
template <class Sum, int Rows>
class scaled_weights {
 public:
  using columns = score_columns<Rows>;
  static constexpr int lane_rows = columns::lane_rows, lane_tokens = columns::lane_tokens;

  __device__ scaled_weights() {
    if constexpr (keeps_columns)
      for (int k = 0; k < tokens_per_lane; ++k) in_column_[k] = detail::opaque(has_column(k) ? 0xffffffffu : 0u);
    for (int i = 0; i < lane_rows; ++i) {
      set(i, smallest);
      sum_[i] = 0.0f;
      zero_[i] = 0.0f;
    }
  }

  /// Turns the weights of a tile and the row scales of its values (load_rows) into the operand, and rescales `sum` if
  /// need be. All lanes take part.
  __device__ void weigh(const float (&w)[lane_tokens][lane_rows], const float (&row)[lane_tokens], Sum& sum,
                        value_operand<Rows>& p) {
    float top[lane_rows];
    if (rises(w, row, top)) {
      float factor[lane_rows];
      raise(top, factor);
      for (int i = 0; i < lane_rows; ++i) zero_[i] *= factor[i];
      sum.rescale(factor);
    }
    if constexpr (columns::spread)
      set_spread_operand(w, row, p);
    else
      set_operand(w, row, p, zero_);
  }

  /// sink(row, channel, value) gets the lane's part of the sums, and weights[i] becomes what the weights of the lane's
  /// row i add up to, in all lanes that have the row. All lanes take part.
  template <class Sink>
  __device__ void finish(const Sum& sum, float (&weights)[lane_rows], Sink&& sink) const {
    float zero[lane_rows];
    total(weights);
    for (int i = 0; i < lane_rows; ++i) {
      zero[i] = zero_[i];
      for (int m = columns::lanes_apart; m < detail::warp_threads; m *= 2) zero[i] += detail::shuffle_xor(zero[i], m);
      zero[i] *= passes::power_of_two(-Sum::power);
    }
    sum.each(zero, [&](int row, int channel, float x) {
      for (int i = 0; i < lane_rows; ++i)
        if (row == columns::row(i)) sink(row, channel, multiplied(x, i));
    });
  }

 protected:
  /// Counts the weights of a tile. `top`: the lane's largest weight times row scale of each row; whether one of the
  /// warp's is beyond its limit.
  __device__ bool rises(const float (&w)[lane_tokens][lane_rows], const float (&row)[lane_tokens],
                        float (&top)[lane_rows]) {
    bool rising = false;
    for (int i = 0; i < lane_rows; ++i) {
      top[i] = 0.0f;
      for (int k = 0; k < lane_tokens; ++k) {
        top[i] = fmaxf(top[i], fabsf(w[k][i] * row[k]));  // NaN is no maximum
        sum_[i] += w[k][i];
      }
      rising = rising || top[i] > limit_[i];
    }
    return __any_sync(detail::all_lanes, rising) != 0;
  }

  /// The operand of weights times row scales; what it holds, as it was rounded, is added to `zero`.
  __device__ void set_operand(const float (&w)[lane_tokens][lane_rows], const float (&row)[lane_tokens],
                              value_operand<Rows>& p, float (&zero)[lane_rows]) const {
    using namespace packkv::detail;
    detail::for_constants<4>([&](auto index) {
      constexpr int t = decltype(index)::value, k0 = 2 * t, k1 = 2 * t + 1;
      constexpr float unit0 = passes::power_of_two(Sum::power - Sum::first_fold(k0));
      constexpr float unit1 = passes::power_of_two(Sum::power - Sum::first_fold(k1));
      const float row0 = row[k0] * unit0, row1 = row[k1] * unit1;
      if constexpr (columns::paired) {
        const std::uint32_t h = pack_halves(scaled(w[k0][0], row0, 0), scaled(w[k1][0], row1, 0));
        const two_floats rounded = unpack_halves(h);
        count<k0>(rounded.low, zero[0]);
        count<k1>(rounded.high, zero[0]);
        p.set_paired(t, h);
      } else {
        for (int n = 0; n < columns::blocks; ++n) {
          const int i0 = 2 * n, i1 = 2 * n + 1;
          const std::uint32_t h0 = pack_halves(scaled(w[k0][i0], row0, i0), scaled(w[k0][i1], row0, i1));
          const std::uint32_t h1 = pack_halves(scaled(w[k1][i0], row1, i0), scaled(w[k1][i1], row1, i1));
          const two_floats low = unpack_halves(h0), high = unpack_halves(h1);
          count<k0>(low.low, zero[i0]);
          count<k0>(low.high, zero[i1]);
          count<k1>(high.low, zero[i0]);
          count<k1>(high.high, zero[i1]);
          p.b[t][n][0] = movmatrix(h0);
          p.b[t][n][1] = movmatrix(h1);
        }
      }
    });
  }

  /// Raises the powers of two for weights up to `top`; sums are to be multiplied by `factor`. All lanes take part.
  __device__ void raise(float (&top)[lane_rows], float (&factor)[lane_rows]) {
    for (int i = 0; i < lane_rows; ++i) {
      for (int m = columns::lanes_apart; m < detail::warp_threads; m *= 2)
        top[i] = fmaxf(top[i], detail::shuffle_xor(top[i], m));
      const auto bits = static_cast<int>(detail::bit_cast<std::uint32_t>(top[i]) >> 23);
      const int exponent = max_of(exponent_[i], bits == 255 ? largest : bits - 126);
      factor[i] = exponential(exponent_[i] - exponent);
      set(i, exponent);
    }
  }
  /// What the weights of the lane's rows add up to, in all lanes that have the row. All lanes take part.
  __device__ void total(float (&weights)[lane_rows]) const {
    for (int i = 0; i < lane_rows; ++i) {
      weights[i] = sum_[i];
      for (int m = columns::lanes_apart; m < detail::warp_threads; m *= 2)
        weights[i] += detail::shuffle_xor(weights[i], m);
    }
  }
  /// A sum of the lane's row i times what its weights were divided by. Two factors, because one would not always be a
  /// float.
  __device__ float multiplied(float x, int i) const {
    return x * exponential(exponent_[i] >> 1) * exponential(exponent_[i] - (exponent_[i] >> 1));
  }

 private:
  /// set_operand for one row.
  __device__ void set_spread_operand(const float (&w)[lane_tokens][lane_rows], const float (&row)[lane_tokens],
                                     value_operand<Rows>& p) {
    const int fold = Sum::first_fold(detail::lane_id() / 4);
    const float unit = exponential(Sum::power - fold);
    const std::uint32_t h = detail::pack_halves(scaled(w[0][0], row[0] * unit, 0), scaled(w[1][0], row[1] * unit, 0));
    const detail::two_floats rounded = detail::unpack_halves(h);
    zero_[0] = fmaf(rounded.low + rounded.high, exponential(fold), zero_[0]);
    p.set_spread([&](int k) { return keeps_columns ? h & in_column_[keeps_columns ? k : 0] : has_column(k) ? h : 0u; });
  }

  /// Weights times row scales are divided by 2^smallest .. 2^largest: all of the range of floats, and what lies beyond.
  static constexpr int smallest = -126, largest = 145;

  /// 2^e; 0 below the normal floats.
  __device__ static float exponential(int e) {
    return detail::bit_cast<float>(static_cast<std::uint32_t>(max_of(e + 127, 0)) << 23);
  }
  __device__ void set(int i, int exponent) {
    exponent_[i] = exponent;
    inverse_low_[i] = exponential(-(exponent >> 1));
    inverse_high_[i] = exponential(-(exponent - (exponent >> 1)));
    // A product beyond the floats is divided by 2^largest, whatever the limit.
    limit_[i] = exponent == largest ? detail::infinity() : exponential(min_of(exponent + Sum::headroom, 127));
  }
  __device__ float scaled(float w, float row, int i) const {
    return w == 0.0f ? 0.0f : w * inverse_low_[i] * (row * inverse_high_[i]);
  }
  template <int K>
  __device__ static void count(float rounded, float& zero) {
    zero = fmaf(rounded, passes::power_of_two(Sum::first_fold(K)), zero);
  }

  /// Whether there are registers for masks of the columns, which save their comparisons.
  static constexpr bool keeps_columns = columns::spread && Sum::dim <= 128;
  __device__ static bool has_column(int k) { return detail::lane_id() / 4 == k; }

  std::uint32_t in_column_[keeps_columns ? tokens_per_lane : 1];
  int exponent_[lane_rows];  ///< of the power of two
  float inverse_low_[lane_rows], inverse_high_[lane_rows], limit_[lane_rows];
  float sum_[lane_rows], zero_[lane_rows];  ///< of weights; of weights times row scales, rounded and divided
};

}  // namespace packkv::warp

// SPDX-License-Identifier: Apache-2.0
// Weighted sums of the 64 values of a coded tile for up to 16 query rows, by fp16 matrix products on the codes.
// One idea: codes stay where they lie in the word, as subnormal halves; the power of two that this means is folded into
// the weights, which are powers of two apart for the planes of different widths.
//   mma_value_sum<Codec, Rows> sum;   value_operand<Rows> p = softmax.weigh(...);   sum.add(tile, p);
#pragma once

#include <packkv/codec/quantize.hpp>
#include <packkv/detail/approx.cuh>
#include <packkv/detail/matrix.cuh>
#include <packkv/detail/unroll.hpp>
#include <packkv/thread/unpack.cuh>
#include <packkv/warp/lane_parameters.cuh>
#include <packkv/warp/score_columns.cuh>
#include <packkv/warp/transform.cuh>

namespace packkv::warp {

/// Weights of a tile as operand B: of the tokens 16 * t on, register r the tokens 8 * r on of these.
template <int Rows>
struct value_operand {
  std::uint32_t b[4][score_columns<Rows>::blocks][2];

  /// Where rows are paired: the operand of the tokens 16 * t on from the lane's weights of two of them. All lanes take
  /// part.
  __device__ void set_paired(int t, std::uint32_t weights) {
    // Lane 4 * c + p has column c: row c / 2, and the tokens of one half of 16 by c's parity.
    const std::uint32_t x = detail::movmatrix(weights);
    const bool odd = (detail::lane_id() / 4) % 2 != 0;
    b[t][0][0] = odd ? 0u : x;
    b[t][0][1] = odd ? x : 0u;
  }
  /// For one row: the operands of all tokens from the lane's weights of two neighbours. Column c has the tokens 8 * c
  /// on, so a lane's weights are in its own column already: in_column(k) is these where that is column k, else 0.
  template <class InColumn>
  __device__ void set_spread(InColumn&& in_column) {
    for (int k = 0; k < tokens_per_lane; ++k) b[k / 2][0][k % 2] = in_column(k);
  }
};

/// The planes of V are added in passes, each over the strips that have a plane of that kind.
namespace passes {

/// A kind of plane.
struct value_pass {
  int bits;    ///< of the plane
  int weight;  ///< log2 of what a code of the plane counts
  int width;   ///< of its strips, the only one or with `other`
  int other;
};
/// Passes, in the order of sections of a V tile.
inline constexpr int count = 5;
/// Pass number `pass`, 0 .. count - 1.
PACKKV_HOST_DEVICE constexpr value_pass of(int pass) {
  switch (pass) {
    case 0:
      return {8, 0, 8, 8};
    case 1:
      return {4, 0, 4, 4};
    case 2:
      return {2, 0, 2, 3};
    case 3:
      return {1, 2, 3, 3};
    default:
      return {1, 0, 1, 1};
  }
}
/// Whether a strip has a plane of this kind.
PACKKV_HOST_DEVICE constexpr bool has_strip(const strip_layout& s, const value_pass& pass, int strip) {
  return s.width[strip] == pass.width || s.width[strip] == pass.other;
}
/// Whether any strip has.
PACKKV_HOST_DEVICE constexpr bool exists(const strip_layout& s, int pass) {
  bool found = false;
  for (int i = 0; i < s.count; ++i) found = found || has_strip(s, of(pass), i);
  return found;
}
/// The pass before `pass` that has strips, or -1.
PACKKV_HOST_DEVICE constexpr int before(const strip_layout& s, int pass) {
  for (int i = pass - 1; i >= 0; --i)
    if (exists(s, i)) return i;
  return -1;
}
/// The first pass that has strips, or 0.
PACKKV_HOST_DEVICE constexpr int first(const strip_layout& s) {
  for (int i = 0; i < count; ++i)
    if (exists(s, i)) return i;
  return 0;
}
/// Power of two by which weights of the tokens 8 * k on must shrink in a pass.
PACKKV_HOST_DEVICE constexpr int fold(int pass, int k) {
  const value_pass p = of(pass);
  return detail::value_field(p.bits, 0, 8 * k, 0).bit - p.weight;
}
/// The largest of a pass.
PACKKV_HOST_DEVICE constexpr int largest_fold(int pass) {
  int largest = 0;
  for (int k = 0; k < 8; ++k) largest = max_of(largest, fold(pass, k));
  return largest;
}
/// 2^exponent.
PACKKV_HOST_DEVICE constexpr float power_of_two(int exponent) {
  float x = 1.0f;
  for (int i = 0; i < exponent; ++i) x *= 2.0f;
  for (int i = 0; i > exponent; --i) x *= 0.5f;
  return x;
}

}  // namespace passes

/// Codec is a static value_codec, or a grouped_value_codec of which the caller adds the groups one by one. Sums are in
/// the transformed basis, before the column scales.
template <class Codec, int Rows>
class mma_value_sum {
 public:
  static constexpr codec_spec spec = Codec::spec();
  static constexpr int dim = spec.head_dim;
  static constexpr int code_bytes = spec.code_bytes();
  using columns = score_columns<Rows>;
  static constexpr int lane_rows = columns::lane_rows;

  /// log2 of how far a weight may exceed 1 before the sums are rescaled.
  static constexpr int headroom = 8;
  /// Weights are multiplied by 2^(power - first_fold(k)) before they are rounded to halves.
  static constexpr int power = passes::exists(spec.strips, 3) ? 5 : 7;
  static_assert(headroom + power + (passes::exists(spec.strips, 3) ? 2 : 0) <= 15, "weights stay below 2^15");
  /// Fold of the first pass, for the tokens 8 * k on.
  PACKKV_HOST_DEVICE static constexpr int first_fold(int k) { return passes::fold(passes::first(spec.strips), k); }
  /// Where weights and row scales become halves before they are multiplied, both have a part of it: weights are
  /// multiplied by 2^weight_power, row scales by 2^(lift - first_fold(k)).
  static constexpr int lift = (passes::largest_fold(passes::first(spec.strips)) + 1) / 2, weight_power = power - lift;

  __device__ mma_value_sum() {
    for (int d = 0; d < strips; ++d)
      for (int n = 0; n < columns::blocks; ++n)
        for (int r = 0; r < 4; ++r) sum_[d][n][r] = 0.0f;
  }

  /// Multiplies the sums of the lane's rows.
  __device__ void rescale(const float (&factor)[lane_rows]) {
    for (int d = 0; d < strips; ++d)
      for (int n = 0; n < columns::blocks; ++n)
        for (int r = 0; r < 4; ++r) sum_[d][n][r] *= factor[columns::lane_rows == 1 ? 0 : 2 * n + r % 2];
  }

  /// Adds Count strips of a tile, from strip First on, with the weights p, which come with the fold of the first pass.
  /// All lanes take part.
  template <int First = 0, int Count = spec.strips.count>
  __device__ void add(const std::uint8_t* tile, value_operand<Rows> p) {
    detail::for_constants<passes::count>([&](auto index) {
      constexpr int pass = decltype(index)::value;
      if constexpr (passes::exists(spec.strips, pass)) {
        constexpr int previous = passes::before(spec.strips, pass);
        if constexpr (previous >= 0) refold<previous, pass>(p);
        detail::for_constants<Count>([&](auto strip) {
          constexpr int d = First + decltype(strip)::value;
          if constexpr (passes::has_strip(spec.strips, passes::of(pass), d)) add_plane<pass, d>(tile, p);
        });
      }
    });
  }

  /// sink(row, channel, value): the lane's part of the sums; `zero[i]` is what the weights times row scales of its row
  /// i add up to, in all lanes. Every (row, channel) comes once. All lanes take part.
  template <class Sink>
  __device__ void each(const float (&zero)[lane_rows], Sink&& sink) const {
    if constexpr (columns::spread)
      each_spread(zero[0], sink);
    else
      each_strip([&](auto strip, int i, int channel, float x) {
        sink(columns::row(i), channel, value_of<decltype(strip)::value>(x, zero[i]));
      });
  }
  /// f(strip, i, channel, x): the lane's part of the sums of codes of its row i, of which 1 / sum_unit is the unit;
  /// `strip` is an integral constant. All lanes take part.
  template <class Function>
  __device__ void each_strip(Function&& f) const {
    static_assert(!columns::spread, "four lanes have parts of a sum");
    const int group = detail::lane_id() / 4;
    detail::for_constants<strips>([&](auto strip) {
      constexpr int d = decltype(strip)::value;
      for (int half = 0; half < 2; ++half)
        for (int i = 0; i < lane_rows; ++i) {
          const float x = columns::lane_rows == 1 ? sum_[d][0][2 * half] + sum_[d][0][2 * half + 1]
                                                  : sum_[d][i / 2][2 * half + i % 2];
          f(strip, i, 16 * d + 8 * half + group, x);
        }
    });
  }
  static constexpr float sum_unit = passes::power_of_two(24 - power);

  using head_values = lane_parameters<Codec>;

  /// Applies columns, inverse basis and offset to one finished row (lane l: channels l, l + 32, ...) whose weights add
  /// up to `weight`: y[i] becomes channel own.channel[i] in the original basis. `own` is what the lane needs of the
  /// head's parameters. All lanes take part.
  __device__ static void finish(const head_values& own, float (&y)[dim / 32], float weight) {
    detail::for_constants<dim / 32>([&](auto index) {
      constexpr int i = decltype(index)::value;
      if constexpr (spec.kind == codec_kind::plan && (spec.strips.width[2 * i] > 0 || spec.strips.width[2 * i + 1] > 0))
        y[i] *= own.column[i];  // sums of channels without codes are 0
    });
    if (spec.transform == transform_kind::hadamard) hadamard<dim>(y);
    if constexpr (spec.transform == transform_kind::basis) times_matrix<dim>(own.basis, y);
    for (int i = 0; i < dim / 32; ++i) y[i] = fmaf(weight, own.offset[i], y[i]);
  }

 private:
  static constexpr int strips = spec.strips.count;

  /// What a sum of codes of a strip is; channels without codes are 0, or NaN like the others.
  template <int Strip>
  __device__ static float value_of(float x, float zero) {
    constexpr int width = spec.strips.width[Strip];
    return width == 0 ? zero - zero : fmaf(x, sum_unit, -detail::code_centre(width) * zero);
  }
  /// each() for one row, of which four lanes have parts: each hands over what it does not keep, half of its sums and
  /// then half of the rest, so that it has a quarter of the channels.
  template <class Sink>
  __device__ void each_spread(float zero, Sink&& sink) const {
    const int lane = detail::lane_id();
    const bool odd = lane % 2 != 0, upper = lane % 4 >= 2;
    float part[strips];
    for (int d = 0; d < strips; ++d) {
      const float low = sum_[d][0][0] + sum_[d][0][1], high = sum_[d][0][2] + sum_[d][0][3];
      part[d] = (odd ? high : low) + detail::shuffle_xor(odd ? low : high, 1);
    }
    detail::for_constants<strips / 2>([&](auto index) {
      constexpr int d = 2 * decltype(index)::value;
      const float x = (upper ? part[d + 1] : part[d]) + detail::shuffle_xor(upper ? part[d] : part[d + 1], 2);
      sink(0, 16 * d + 8 * (lane % 4) + lane / 4, upper ? value_of<d + 1>(x, zero) : value_of<d>(x, zero));
    });
  }

  /// Multiplies the operand by the ratio of two passes' folds.
  template <int Before, int Pass>
  __device__ static void refold(value_operand<Rows>& p) {
    detail::for_constants<tokens_per_lane>([&](auto index) {
      constexpr int k = decltype(index)::value, exponent = passes::fold(Before, k) - passes::fold(Pass, k);
      if constexpr (exponent != 0)
        for (int n = 0; n < columns::blocks; ++n)
          p.b[k / 2][n][k % 2] = detail::scale_halves(p.b[k / 2][n][k % 2], passes::power_of_two(exponent));
    });
  }

  template <int Pass, int Strip>
  __device__ void add_plane(const std::uint8_t* tile, const value_operand<Rows>& p) {
    using plane = thread::value_plane<passes::of(Pass).bits>;
    constexpr int first = passes::of(Pass).weight > 0 ? spec.strips.high[Strip] : spec.strips.low[Strip];
    std::uint32_t w[plane::words];
    plane::load(w, reinterpret_cast<const std::uint32_t*>(tile) + first, detail::lane_id());
    detail::for_constants<4>([&](auto index) {
      constexpr int t = decltype(index)::value;
      const std::uint32_t a[4] = {plane::template in_place<t, 0>(w), plane::template in_place<t, 1>(w),
                                  plane::template in_place<t, 2>(w), plane::template in_place<t, 3>(w)};
      for (int n = 0; n < columns::blocks; ++n) detail::mma_f16(sum_[Strip][n], a, p.b[t][n]);
    });
  }

  float sum_[strips][columns::blocks][4];
};

/// What the operands of Sum, an mma_value_sum, add up to.
template <class Sum, int Rows>
class operand_total {
 public:
  using columns = score_columns<Rows>;
  static_assert(!columns::spread, "rows have columns of their own");
  static constexpr int lane_rows = columns::lane_rows;

  /// Adds an operand, which comes with the fold of the first pass. All lanes take part.
  __device__ void add(const value_operand<Rows>& p) {
    detail::for_constants<4>([&](auto index) {
      constexpr int t = decltype(index)::value;
      // 8 of the 16 rows are enough, and what the others have costs no instruction.
      const std::uint32_t a[4] = {unfold<2 * t>(), detail::anything(), unfold<2 * t + 1>(), detail::anything()};
      for (int n = 0; n < columns::blocks; ++n) detail::mma_f16(sum_[n], a, p.b[t][n]);
    });
  }
  /// Multiplies what the lane's rows have.
  __device__ void rescale(const float (&factor)[lane_rows]) {
    for (int n = 0; n < columns::blocks; ++n)
      for (int r = 0; r < 2; ++r) sum_[n][r] *= factor[columns::paired ? 0 : 2 * n + r];
  }
  /// total[i]: of the lane's row i; the same in all lanes that have the row.
  __device__ void get(float (&total)[lane_rows]) const {
    constexpr float unit = passes::power_of_two(-Sum::power);
    for (int i = 0; i < lane_rows; ++i)
      total[i] = unit * (columns::paired ? sum_[0][0] + sum_[0][1] : sum_[i / 2][i % 2]);
  }

 private:
  /// What brings the weights of the tokens 8 * K on to one unit, for both halves.
  template <int K>
  __device__ static std::uint32_t unfold() {
    return (15u + static_cast<std::uint32_t>(Sum::first_fold(K))) * 0x04000400u;
  }

  float sum_[columns::blocks][4] = {};
};

}  // namespace packkv::warp

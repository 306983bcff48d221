// SPDX-License-Identifier: Apache-2.0
// Sums of coded values with weights of any size, as a warp of value_gemv has them: of plans, and of values that are
// grouped along channels.
// One idea: what belongs to the weights is done first (weigh), so that the next weights can be loaded while a tile is
// added (add).
//   weighted_sum_of<Codec, Rows> sum;   sum.weigh(tile, w);   sum.add(tile);   sum.finish(weights, sink);
#pragma once

#include <packkv/warp/lane_numbers.cuh>
#include <packkv/warp/scaled_weights.cuh>

namespace packkv::warp {

/// Codec is a static value_codec.
template <class Codec, int Rows>
class plan_weighted_sum {
 public:
  using values = mma_value_sum<Codec, Rows>;
  static constexpr int lane_rows = values::lane_rows, lane_tokens = values::columns::lane_tokens;

  /// w[k][i]: weight of the lane's token k and row i. All lanes take part, here and below.
  __device__ void weigh(const std::uint8_t* tile, const float (&w)[lane_tokens][lane_rows]) {
    float row[lane_tokens];
    load_rows<Rows>(tile + values::code_bytes, row);
    weights_.weigh(w, row, sum_, p_);
  }
  /// Adds the tile that was weighed.
  __device__ void add(const std::uint8_t* tile) { sum_.add(tile, p_); }
  /// sink(row, channel, value) gets the lane's part of the sums, and weights[i] becomes what the weights of the lane's
  /// row i add up to, in all lanes that have the row.
  template <class Sink>
  __device__ void finish(float (&weights)[lane_rows], Sink&& sink) const {
    weights_.finish(sum_, weights, sink);
  }

 private:
  scaled_weights<values, Rows> weights_;
  values sum_;
  value_operand<Rows> p_;
};

/// Codec is a static grouped_value_codec. Each weight times range of a group is rounded to a half as in scaled_weights;
/// weights times middles of the ranges are summed in float.
template <class Codec, int Rows>
class grouped_weighted_sum : scaled_weights<mma_value_sum<Codec, Rows>, Rows> {
 public:
  using values = mma_value_sum<Codec, Rows>;
  static constexpr codec_spec spec = Codec::spec();
  static constexpr int lane_rows = values::lane_rows;

  __device__ grouped_weighted_sum() {
    for (int g = 0; g < groups; ++g)
      for (int i = 0; i < lane_rows; ++i) {
        middle_[g][i] = 0.0f;
        half_[g][i] = 0.0f;
      }
  }

  __device__ void weigh(const std::uint8_t* tile, const float (&w)[tokens_per_lane][lane_rows]) {
    float widest[tokens_per_lane] = {}, top[lane_rows];
    for (int g = 0; g < groups; ++g) {
      const lane_numbers<Codec> n(tile, g);
      for (int k = 0; k < tokens_per_lane; ++k) widest[k] = fmaxf(widest[k], half_range(n, k));
    }
    if (this->rises(w, widest, top)) {
      float factor[lane_rows];
      this->raise(top, factor);
      for (int i = 0; i < lane_rows; ++i)
        for (int g = 0; g < groups; ++g) half_[g][i] *= factor[i];
      sum_.rescale(factor);
    }
    for (int k = 0; k < tokens_per_lane; ++k)
      for (int i = 0; i < lane_rows; ++i) weight_[k][i] = w[k][i];
  }
  __device__ void add(const std::uint8_t* tile) {
    detail::for_constants<groups>([&](auto index) {
      constexpr int g = decltype(index)::value;
      const lane_numbers<Codec> n(tile, g);
      float range[tokens_per_lane];
      for (int k = 0; k < tokens_per_lane; ++k) {
        range[k] = half_range(n, k);
        const float middle = 0.5f * n.least(k) + 0.5f * n.most(k);
        for (int i = 0; i < lane_rows; ++i)
          middle_[g][i] = weight_[k][i] == 0.0f ? middle_[g][i] : fmaf(weight_[k][i], middle, middle_[g][i]);
      }
      value_operand<Rows> p = {};
      this->set_operand(weight_, range, p, half_[g]);
      sum_.template add<g * strips, strips>(tile, p);
    });
  }
  template <class Sink>
  __device__ void finish(float (&weights)[lane_rows], Sink&& sink) const {
    float half[groups][lane_rows], middle[groups][lane_rows];
    this->total(weights);
    for (int g = 0; g < groups; ++g)
      for (int i = 0; i < lane_rows; ++i) {
        half[g][i] = half_[g][i];
        middle[g][i] = middle_[g][i];
        for (int m = 4; m < detail::warp_threads; m *= 2) {
          half[g][i] += detail::shuffle_xor(half[g][i], m);
          middle[g][i] += detail::shuffle_xor(middle[g][i], m);
        }
      }
    // Codes count from the middle of their range, half of which is what a weight was multiplied by.
    constexpr float unit = values::sum_unit * 2.0f / static_cast<float>((1 << spec.strips.width[0]) - 1);
    sum_.each_strip([&](auto strip, int i, int channel, float x) {
      constexpr int g = decltype(strip)::value / strips;
      const float y = fmaf(x, unit, half[g][i] * -passes::power_of_two(-values::power));
      sink(values::columns::row(i), channel, this->multiplied(y, i) + middle[g][i]);
    });
  }

 private:
  static constexpr int groups = spec.head_dim / spec.group, strips = spec.group / 16;  ///< strips of a group

  __device__ static float half_range(const lane_numbers<Codec>& n, int k) {
    return 0.5f * n.most(k) - 0.5f * n.least(k);
  }

  values sum_;
  float weight_[tokens_per_lane][lane_rows];
  float middle_[groups][lane_rows];  ///< weights times middles
  float half_[groups][lane_rows];    ///< weights times half a range, rounded and divided as the operand is
};

/// The weighted sums of a codec's tiles.
template <class Codec, int Rows>
using weighted_sum_of = std::conditional_t<Codec::spec().kind == codec_kind::grouped, grouped_weighted_sum<Codec, Rows>,
                                           plan_weighted_sum<Codec, Rows>>;

}  // namespace packkv::warp

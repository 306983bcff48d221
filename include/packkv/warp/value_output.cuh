// SPDX-License-Identifier: Apache-2.0
// Softmax and weighted sums of coded tiles together: what a warp of the decode kernel has of its rows.
//   value_output_of<Codec, Rows> output;   output.add(tile, s, hidden);   output.finish(maximum, total, sink);
#pragma once

#include <packkv/warp/grouped_output.cuh>

namespace packkv::warp {

/// Codec is a static value_codec.
template <class Codec, int Rows>
class plan_output {
 public:
  using values = mma_value_sum<Codec, Rows>;
  static constexpr int lane_rows = score_columns<Rows>::lane_rows;

  /// As grouped_output's.
  __device__ void add(const std::uint8_t* tile, float (&s)[tokens_per_lane][lane_rows], std::uint32_t hidden) {
    value_operand<Rows> p;
    softmax_.weigh(s, load_rows(tile + values::code_bytes), hidden, sum_, p);
    sum_.add(tile, p);
  }
  template <class Sink>
  __device__ void finish(float (&maximum)[lane_rows], float (&total)[lane_rows], Sink&& sink) const {
    float zero[lane_rows];
    softmax_.finish(maximum, total, zero);
    const float unit = softmax_.row_unit();
    sum_.each(zero, [&](int row, int channel, float x) { sink(row, channel, x * unit); });
  }

 private:
  lazy_softmax<values, Rows> softmax_;
  values sum_;
};

/// The output of a codec's tiles.
template <class Codec, int Rows>
using value_output_of = std::conditional_t<Codec::spec().kind == codec_kind::grouped, grouped_output<Codec, Rows>,
                                           plan_output<Codec, Rows>>;

}  // namespace packkv::warp

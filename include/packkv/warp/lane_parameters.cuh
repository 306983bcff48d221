// SPDX-License-Identifier: Apache-2.0
// What a lane needs of a head's parameters for the channels l, l + 32, ... of a vector that a warp holds.
// One idea: all loads first, under one condition each: loaded where they are used, each would wait for memory alone.
//   const auto own = lane_parameters<Codec>::load(head);   y[i] *= own.column[i];
#pragma once

#include <packkv/codec/quantize.hpp>
#include <packkv/detail/cuda.cuh>
#include <packkv/detail/unroll.hpp>

namespace packkv::warp {

/// Codec is a static key_codec or value_codec of kind plan.
template <class Codec>
struct lane_parameters {
  static constexpr codec_spec spec = Codec::spec();
  static constexpr int count = spec.head_dim / 32;

  int channel[count];   ///< in the original basis, of the transformed channel lane + 32 * i
  float offset[count];  ///< of channel[i]
  float column[count];  ///< step of the transformed channel lane + 32 * i, before the row scale
  float leading;        ///< scale of leading component `lane`
  const float* basis;   ///< of the head

  /// All lanes take part.
  __device__ static lane_parameters load(const head_parameters& head) {
    lane_parameters own = {};
    const int lane = detail::lane_id();
    for (int i = 0; i < count; ++i) own.channel[i] = lane + 32 * i;
    if (spec.transform == transform_kind::permutation)
      for (int i = 0; i < count; ++i) own.channel[i] = head.permutation[own.channel[i]];
    if (head.column_scale != nullptr)
      for (int i = 0; i < count; ++i) own.column[i] = head.column_scale[lane + 32 * i];
    else
      detail::for_constants<count>([&](auto index) {
        constexpr int i = decltype(index)::value;
        own.column[i] = gaussian_step(lane_parameters::template width_of<i>());
      });
    own.basis = head.basis;
    if (lane < spec.leading) own.leading = head.leading_scale[lane];
    if (head.channel_offset != nullptr)
      for (int i = 0; i < count; ++i) own.offset[i] = head.channel_offset[own.channel[i]];
    return own;
  }

  /// Width of the transformed channel lane + 32 * Part.
  template <int Part>
  __device__ static int width_of() {
    constexpr int low = spec.strips.width[32 * Part / spec.strips.channels];
    constexpr int high = spec.strips.width[(32 * Part + 16) / spec.strips.channels];
    return detail::lane_id() < 16 ? low : high;
  }
};

}  // namespace packkv::warp

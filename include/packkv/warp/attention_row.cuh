// SPDX-License-Identifier: Apache-2.0
// One row of attention in parts: a warp holds maximum, sum and weighted values, and joins parts in a fixed order.
//   attention_row<D> row;   row.join(other);   // out = channel / sum
#pragma once

#include <packkv/detail/approx.cuh>

namespace packkv::warp {

/// One row of unnormalised attention: maximum (base 2), sum of weights, weighted sum of values.
template <int HeadDim>
struct attention_row {
  float maximum;
  float sum;
  float channel[HeadDim / 32];

  /// Adds another part of the same row.
  __device__ void join(const attention_row& other) {
    const float m = fmaxf(maximum, other.maximum);
    const float a = factor(maximum, m), b = factor(other.maximum, m);
    maximum = m;
    sum = sum * a + other.sum * b;
    for (int i = 0; i < HeadDim / 32; ++i) channel[i] = channel[i] * a + other.channel[i] * b;
  }
  /// Maximum of a row that has seen nothing; finite, so that differences are numbers.
  static constexpr float lowest = -1e30f;
  __device__ static float factor(float from, float to) { return from == to ? 1.0f : detail::exp2_approx(from - to); }
};

}  // namespace packkv::warp

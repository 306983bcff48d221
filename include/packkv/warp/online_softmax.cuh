// SPDX-License-Identifier: Apache-2.0
// Running softmax of a few query rows over tiles of 64 tokens, one warp, base 2.
// One idea: a tile's weights are relative to the largest score so far; sums made before are rescaled when it grows.
//   online_softmax<Rows> softmax;   softmax.weigh(scores, rescale);   // scores become weights
#pragma once

#include <packkv/detail/arith.hpp>
#include <packkv/detail/cuda.cuh>

namespace packkv::warp {

/// Maximum (base-2 exponent) and sum of weights of `Rows` rows; the same values in all lanes.
template <int Rows>
struct online_softmax {
  float maximum[Rows];
  float sum[Rows];

  __device__ online_softmax() {
    for (int r = 0; r < Rows; ++r) {
      maximum[r] = -detail::infinity();
      sum[r] = 0.0f;
    }
  }

  /// Turns scores (base 2; -inf = not visible) of tokens lane and lane + 32 into weights, and sets rescale[r] to
  /// the factor by which earlier weighted sums of row r shrink. NaN scores make the row NaN. All lanes take part.
  __device__ void weigh(float (&scores)[2][Rows], float (&rescale)[Rows]) {
    using namespace packkv::detail;
    for (int r = 0; r < Rows; ++r) {
      const float m = fmaxf(maximum[r], warp_max(fmaxf(scores[0][r], scores[1][r])));
      rescale[r] = maximum[r] == m ? 1.0f : exp2_approx(maximum[r] - m);
      maximum[r] = m;
      for (int j = 0; j < 2; ++j) scores[j][r] = scores[j][r] == -infinity() ? 0.0f : exp2_approx(scores[j][r] - m);
      sum[r] = fmaf(sum[r], rescale[r], warp_sum(scores[0][r] + scores[1][r]));
    }
  }
};

}  // namespace packkv::warp

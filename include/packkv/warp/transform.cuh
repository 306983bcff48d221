// SPDX-License-Identifier: Apache-2.0
// One token (or query) held by a warp: lane l has the channels l, l + 32, l + 64, ... in registers.
// One idea: butterflies of stride < 32 are shuffles, the others stay in the lane; same bits as the host version.
//   float y[D / 32];   warp::hadamard<D>(y);
#pragma once

#include <packkv/codec/transform.hpp>
#include <packkv/detail/cuda.cuh>

namespace packkv::warp {

/// Orthonormal Hadamard transform in place (docs/format.md, section 6); its own inverse. All lanes take part.
template <int HeadDim>
__device__ inline void hadamard(float (&x)[HeadDim / 32]) {
  using namespace packkv::detail;
  constexpr int block = hadamard_block(HeadDim);
  const int lane = lane_id();
  for (int stride = 1; stride < warp_threads; stride *= 2)
    for (int i = 0; i < HeadDim / 32; ++i) {
      const float other = shuffle_xor(x[i], stride);
      x[i] = (lane & stride) == 0 ? add_rn(x[i], other) : sub_rn(other, x[i]);
    }
#pragma unroll
  for (int step = 1; step < block / 32; step *= 2)
#pragma unroll
    for (int i = 0; i < HeadDim / 32; ++i)
      if ((i & step) == 0) {
        const float a = x[i], b = x[i + step];
        x[i] = add_rn(a, b);
        x[i + step] = sub_rn(a, b);
      }
  for (int i = 0; i < HeadDim / 32; ++i) x[i] = mul_rn(x[i], hadamard_scale(block));
}

/// y = T x with x[c] = source(c).
template <int HeadDim, class Source>
__device__ inline void load_transformed(transform_kind kind, const std::int16_t* permutation, Source&& source,
                                        float (&y)[HeadDim / 32]) {
  for (int i = 0; i < HeadDim / 32; ++i) {
    const int c = detail::lane_id() + 32 * i;
    y[i] = source(kind == transform_kind::permutation ? permutation[c] : c);
  }
  if (kind == transform_kind::hadamard) hadamard<HeadDim>(y);
}

/// x = T^-1 y, each channel handed to sink(c, x[c]). Changes y.
template <int HeadDim, class Sink>
__device__ inline void store_inverse(transform_kind kind, const std::int16_t* permutation, float (&y)[HeadDim / 32],
                                     Sink&& sink) {
  if (kind == transform_kind::hadamard) hadamard<HeadDim>(y);
  for (int i = 0; i < HeadDim / 32; ++i) {
    const int c = detail::lane_id() + 32 * i;
    sink(kind == transform_kind::permutation ? permutation[c] : c, y[i]);
  }
}

}  // namespace packkv::warp

// SPDX-License-Identifier: Apache-2.0
// One token (or query) held by a warp: lane l has the channels l, l + 32, l + 64, ... in registers.
// One idea: butterflies of stride < 32 are shuffles, the others stay in the lane; same bits as the host version.
//   float y[D / 32];   warp::hadamard<D>(y);
#pragma once

#include <packkv/codec/transform.hpp>
#include <packkv/detail/cuda.cuh>
#include <packkv/detail/unroll.hpp>

namespace packkv::warp {

/// Orthonormal Hadamard transform in place (docs/format.md, section 6); its own inverse. All lanes take part.
template <int HeadDim>
__device__ inline void hadamard(float (&x)[HeadDim / 32]) {
  using namespace packkv::detail;
  constexpr int block = hadamard_block(HeadDim);
  const int lane = lane_id();
  for (int stride = 1; stride < warp_threads; stride *= 2) {
    const float sign = (lane & stride) == 0 ? 1.0f : -1.0f;
    for (int i = 0; i < HeadDim / 32; ++i)
      x[i] = fmaf(sign, x[i], shuffle_xor(x[i], stride));  // one rounding, as that of a sum
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

/// x becomes the sums of x[r] * m[r][c] for m [HeadDim, HeadDim], with the bits of the host version. All lanes take
/// part.
template <int HeadDim>
__device__ inline void times_matrix(const float* m, float (&x)[HeadDim / 32]) {
  using namespace packkv::detail;
  float sum[HeadDim / 32] = {};
  for_constants<HeadDim / 32>([&](auto index) {
    constexpr int part = decltype(index)::value;
#pragma unroll 4
    for (int from = 0; from < warp_threads; ++from) {
      const float of_row = shuffle(x[part], from);
      const float* const row = m + (32 * part + from) * HeadDim + lane_id();
      for (int i = 0; i < HeadDim / 32; ++i) sum[i] = add_rn(sum[i], mul_rn(of_row, row[32 * i]));
    }
  });
  for (int i = 0; i < HeadDim / 32; ++i) x[i] = sum[i];
}
/// x becomes the sums of m[r][c] * x[c], m 16-byte aligned. All lanes take part.
template <int HeadDim>
__device__ inline void matrix_times(const float* m, float (&x)[HeadDim / 32]) {
  using namespace packkv::detail;
  float sum[HeadDim / 32] = {};
  for_constants<HeadDim / 32>([&](auto index) {
    constexpr int part = decltype(index)::value;
#pragma unroll 1
    for (int from = 0; from < warp_threads; from += 4) {
      float of_column[4];
      for (int k = 0; k < 4; ++k) of_column[k] = shuffle(x[part], from + k);
      for (int i = 0; i < HeadDim / 32; ++i) {
        const bytes16 four = load16(m + (lane_id() + 32 * i) * HeadDim + 32 * part + from);
        for (int k = 0; k < 4; ++k) sum[i] = fmaf(bit_cast<float>(four.word[k]), of_column[k], sum[i]);
      }
    }
  });
  for (int i = 0; i < HeadDim / 32; ++i) x[i] = sum[i];
}

/// Sums of 2 * Half values over the lanes of a warp, all or those that agree in the higher bits of their number: lane l
/// gets the sum of everybody's v[l % (2 * Half)]. All lanes take part.
template <int Half = 16>
__device__ inline float sums_of_lanes(float (&v)[32]) {
  if constexpr (Half == 0) {
    return v[0];
  } else {
    const bool upper = (detail::lane_id() & Half) != 0;
    detail::for_constants<Half>([&](auto index) {
      constexpr int k = decltype(index)::value;
      const float kept = upper ? v[k + Half] : v[k], given = upper ? v[k] : v[k + Half];
      v[k] = kept + detail::shuffle_xor(given, Half);
    });
    return sums_of_lanes<Half / 2>(v);
  }
}
/// out[r][i] = sum of m[i][c] * x[r][c] for a block's queries in shared memory, by warp `warp` of `warps`: the rows of
/// m are read once, side by side. The caller synchronises the block before and after.
template <int HeadDim, int Rows>
__device__ inline void matrix_times_rows(const float* m, const float (&x)[Rows][HeadDim], float (&out)[Rows][HeadDim],
                                         int warp, int warps) {
  using namespace packkv::detail;
  constexpr int together = warp_threads / Rows;  // rows of m
#pragma unroll 1
  for (int first = together * warp; first < HeadDim; first += together * warps) {
    float sum[warp_threads] = {};
    for_constants<(HeadDim + 127) / 128>([&](auto part) {
      const int c = 128 * decltype(part)::value + 4 * lane_id();
      if (HeadDim % 128 != 0 && c >= HeadDim) return;
      bytes16 of_m[together];
      for_constants<together>(
          [&](auto i) { of_m[decltype(i)::value] = load16(m + (first + decltype(i)::value) * HeadDim + c); });
      for_constants<Rows>([&](auto row) {
        constexpr int r = decltype(row)::value;
        const bytes16 of_x = load16(&x[r][c]);
        for_constants<4 * together>([&](auto index) {
          constexpr int i = decltype(index)::value / 4, k = decltype(index)::value % 4;
          sum[i * Rows + r] = fmaf(bit_cast<float>(of_m[i].word[k]), bit_cast<float>(of_x.word[k]), sum[i * Rows + r]);
        });
      });
    });
    const float all = sums_of_lanes(sum);
    out[lane_id() % Rows][first + lane_id() / Rows] = all;
  }
}

/// y = T x with x[c] = source(c), for tokens.
template <int HeadDim, class Source>
__device__ inline void load_transformed(transform_kind kind, const transform_data& data, Source&& source,
                                        float (&y)[HeadDim / 32]) {
  for (int i = 0; i < HeadDim / 32; ++i) {
    const int c = detail::lane_id() + 32 * i;
    y[i] = source(kind == transform_kind::permutation ? data.permutation[c] : c);
  }
  if (kind == transform_kind::hadamard) hadamard<HeadDim>(y);
  if (kind == transform_kind::basis) times_matrix<HeadDim>(data.basis_inverse, y);
}
/// The query y of the transformed channels for which q.x = y.(T x), with q[c] = source(c).
template <int HeadDim, class Source>
__device__ inline void load_query_transformed(transform_kind kind, const transform_data& data, Source&& source,
                                              float (&y)[HeadDim / 32]) {
  load_transformed<HeadDim>(kind == transform_kind::basis ? transform_kind::identity : kind, data, source, y);
  if (kind == transform_kind::basis) matrix_times<HeadDim>(data.basis, y);
}

/// x = T^-1 y, each channel handed to sink(c, x[c]). Changes y.
template <int HeadDim, class Sink>
__device__ inline void store_inverse(transform_kind kind, const transform_data& data, float (&y)[HeadDim / 32],
                                     Sink&& sink) {
  if (kind == transform_kind::hadamard) hadamard<HeadDim>(y);
  if (kind == transform_kind::basis) times_matrix<HeadDim>(data.basis, y);
  for (int i = 0; i < HeadDim / 32; ++i) {
    const int c = detail::lane_id() + 32 * i;
    sink(kind == transform_kind::permutation ? data.permutation[c] : c, y[i]);
  }
}

}  // namespace packkv::warp

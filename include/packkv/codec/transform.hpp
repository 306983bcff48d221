// SPDX-License-Identifier: Apache-2.0
// Changes of channel basis applied to a token before quantisation, and to q and O at decode.
#pragma once

#include <cstdint>
#include <packkv/codec/strips.hpp>
#include <packkv/core/config.hpp>
#include <packkv/detail/arith.hpp>

namespace packkv {

/// The transforms below, as data.
enum class transform_kind : std::uint8_t { identity, permutation, hadamard, basis };

/// y = x.
struct identity {
  static constexpr transform_kind kind = transform_kind::identity;
};
/// y[i] = x[p[i]] with a calibrated permutation per KV head (side_parameters::permutation).
struct permutation {
  static constexpr transform_kind kind = transform_kind::permutation;
};
/// y = H x / sqrt(n), H the Sylvester-Hadamard matrix, block-diagonal with blocks of the largest power of two
/// n that divides head_dim (head_dim 96: n = 32; 192: n = 64).
struct hadamard {
  static constexpr transform_kind kind = transform_kind::hadamard;
};

/// x = sum of y[i] * basis[i][:] with a calibrated, invertible matrix per KV head (side_parameters::basis), orthogonal
/// or not: q.x is then the sum of y[i] * (q . basis[i][:]).
struct basis {
  static constexpr transform_kind kind = transform_kind::basis;
};

/// What a transform of one KV head needs at run time.
struct transform_data {
  const std::int16_t* permutation = nullptr;
  const float* basis = nullptr;          ///< [head_dim, head_dim]
  const float* basis_inverse = nullptr;  ///< [head_dim, head_dim]
};

/// Size of a Hadamard block: the largest power of two that divides `head_dim`.
PACKKV_HOST_DEVICE constexpr int hadamard_block(int head_dim) { return head_dim & -head_dim; }

/// 1/sqrt(block), the nearest float.
PACKKV_HOST_DEVICE constexpr float hadamard_scale(int block) {
  switch (block) {
    case 32:
      return 0.1767766952966369f;
    case 64:
      return 0.125f;
    case 128:
      return 0.08838834764831845f;
    case 256:
      return 0.0625f;
    default:
      return 0.04419417382415922f;  // 512
  }
}

namespace detail {

/// Hadamard of one token in place. Butterflies in order of stride 1, 2, 4, ...; every step rounds once, so
/// the warp version (warp/transform.cuh) gives the same bits. The transform is its own inverse.
PACKKV_HOST_DEVICE inline void hadamard_in_place(float* x, int head_dim) {
  const int block = hadamard_block(head_dim);
  for (int stride = 1; stride < block; stride *= 2)
    for (int i = 0; i < head_dim; ++i)
      if ((i & stride) == 0) {
        const float a = x[i], b = x[i + stride];
        x[i] = add_rn(a, b);
        x[i + stride] = sub_rn(a, b);
      }
  const float scale = hadamard_scale(block);
  for (int i = 0; i < head_dim; ++i) x[i] = mul_rn(x[i], scale);
}

/// out[c] = sum of x[r] * m[r][c], in ascending order of r; every step rounds once, as in the warp version.
PACKKV_HOST_DEVICE inline void times_matrix(const float* m, int head_dim, const float* x, float* out) {
  for (int c = 0; c < head_dim; ++c) out[c] = 0.0f;
  for (int r = 0; r < head_dim; ++r)
    for (int c = 0; c < head_dim; ++c) out[c] = add_rn(out[c], mul_rn(x[r], m[r * head_dim + c]));
}

/// y = T x for one token. x and y do not overlap.
PACKKV_HOST_DEVICE inline void transform_forward(transform_kind kind, const transform_data& data, int head_dim,
                                                 const float* x, float* y) {
  if (kind == transform_kind::basis) return times_matrix(data.basis_inverse, head_dim, x, y);
  for (int i = 0; i < head_dim; ++i) y[i] = x[kind == transform_kind::permutation ? data.permutation[i] : i];
  if (kind == transform_kind::hadamard) hadamard_in_place(y, head_dim);
}

/// x = T^-1 y. x and y do not overlap.
PACKKV_HOST_DEVICE inline void transform_inverse(transform_kind kind, const transform_data& data, int head_dim,
                                                 const float* y, float* x) {
  if (kind == transform_kind::basis) return times_matrix(data.basis, head_dim, y, x);
  for (int i = 0; i < head_dim; ++i) x[kind == transform_kind::permutation ? data.permutation[i] : i] = y[i];
  if (kind == transform_kind::hadamard) hadamard_in_place(x, head_dim);
}

}  // namespace detail
}  // namespace packkv

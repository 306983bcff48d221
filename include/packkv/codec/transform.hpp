// SPDX-License-Identifier: Apache-2.0
// Orthogonal changes of channel basis applied to a token before quantisation, and to q and O at decode.
#pragma once

#include <cstdint>
#include <packkv/codec/strips.hpp>
#include <packkv/core/config.hpp>
#include <packkv/detail/arith.hpp>

namespace packkv {

enum class transform_kind : std::uint8_t { identity, permutation, hadamard };

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

/// y = T x for one token or query.
PACKKV_HOST_DEVICE inline void transform_forward(transform_kind kind, const std::int16_t* permutation, int head_dim,
                                                 const float* x, float* y) {
  for (int i = 0; i < head_dim; ++i) y[i] = x[kind == transform_kind::permutation ? permutation[i] : i];
  if (kind == transform_kind::hadamard) hadamard_in_place(y, head_dim);
}

/// x = T^-1 y.
PACKKV_HOST_DEVICE inline void transform_inverse(transform_kind kind, const std::int16_t* permutation, int head_dim,
                                                 const float* y, float* x) {
  for (int i = 0; i < head_dim; ++i) x[kind == transform_kind::permutation ? permutation[i] : i] = y[i];
  if (kind == transform_kind::hadamard) hadamard_in_place(x, head_dim);
}

}  // namespace detail
}  // namespace packkv

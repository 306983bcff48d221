// SPDX-License-Identifier: Apache-2.0
// The CPU definition of a tile: encode one token into it, decode one token from it.
// One idea: a token's bytes depend on that token alone, so a tile is encoded token by token in any order.
//   reference::encode_token(spec, head, x, token, tile, report);   reference::decode_token(spec, head, tile, token, x);
#pragma once

#include <cstdint>
#include <cstring>
#include <packkv/codec/layout.hpp>
#include <packkv/codec/pages.hpp>
#include <packkv/codec/quantize.hpp>
#include <packkv/codec/transform.hpp>

namespace packkv::reference {

namespace detail {

inline void store_bits(std::uint8_t* tile, std::int64_t offset, std::uint16_t bits) {
  std::memcpy(tile + offset, &bits, 2);
}
inline std::uint16_t load_bits(const std::uint8_t* tile, std::int64_t offset) {
  std::uint16_t bits;
  std::memcpy(&bits, tile + offset, 2);
  return bits;
}

inline void encode_plan_token(const codec_spec& spec, const head_parameters& head, const float* x, int token,
                              std::uint8_t* tile, device_report& report) {
  using namespace packkv::detail;
  const int dim = spec.head_dim;
  float centred[max_head_dim], y[max_head_dim];
  for (int c = 0; c < dim; ++c) centred[c] = head.channel_offset != nullptr ? sub_rn(x[c], head.offset(c)) : x[c];
  transform_forward(spec.transform, head.transform(), dim, centred, y);

  // 32 partial sums, then a tree: the order in which a warp adds (warp/token_codec.cuh).
  double partial[32] = {};
  bool finite = true, in_range = true;
  for (int c = 0; c < dim; ++c) {
    finite = finite && is_finite(x[c]);
    in_range = in_range && is_finite(y[c]);
    if (c >= spec.leading) partial[c % 32] = add_square(partial[c % 32], y[c]);
  }
  for (int stride = 16; stride > 0; stride /= 2)
    for (int i = 0; i < stride; ++i) partial[i] += partial[i + stride];

  const std::uint16_t scale_bits =
      finite && in_range ? row_scale_bits(partial[0], dim - spec.leading) : std::uint16_t{0x7fff};
  if (!finite)
    report.flags |= report_nonfinite_input;
  else if (scale_bits == 0x7fff)
    report.flags |= report_scale_overflow;
  const float row = half_to_float(scale_bits);
  const bool valid = scale_bits != 0x7fff;

  std::uint32_t* words = reinterpret_cast<std::uint32_t*>(tile);
  for (int c = 0; c < dim; ++c) {
    const code_place place = locate(spec.strips, token, c);
    if (place.width == 0) continue;
    std::uint32_t code = 0;
    if (valid && c >= spec.leading) {
      const float step = mul_rn(row, column_of(head, place.width, c));
      code = encode_element(y[c], step, place.width);
    }
    const code_writes writes = split_code(place, code);
    for (int i = 0; i < writes.count; ++i) {
      const code_write& w = writes.write[i];
      words[w.word] = (words[w.word] & ~w.mask) | w.bits;
    }
  }
  store_bits(tile, spec.code_bytes() + 2 * row_slot(token), scale_bits);
  for (int i = 0; i < spec.leading; ++i) {
    bool clamped = false;
    const std::int8_t q = valid ? encode_leading(y[i], head.leading_scale[i], clamped) : std::int8_t{0};
    report.leading_clamps += clamped ? 1u : 0u;
    std::memcpy(tile + spec.leading_offset() + i * tile_tokens + row_slot(token), &q, 1);
  }
}

}  // namespace detail

/// Codes token `token` (0..63) of a tile from its head_dim channels. Touches only the bits that the token owns.
inline void encode_token(const codec_spec& spec, const head_parameters& head, const float* x, int token,
                         std::uint8_t* tile, device_report& report) {
  if (spec.kind == codec_kind::plan) return detail::encode_plan_token(spec, head, x, token, tile, report);
  for (int c = 0; c < spec.head_dim; ++c) {
    const std::int64_t at = static_cast<std::int64_t>(token) * spec.head_dim + c;
    const bool finite = packkv::detail::is_finite(x[c]);
    if (!finite) report.flags |= report_nonfinite_input;
    if (spec.kind == codec_kind::fp8) {
      const float u = packkv::detail::div_rn(x[c], head.tensor_scale);
      if (finite && !(u >= -448.0f && u <= 448.0f)) report.flags |= report_scale_overflow;
      tile[at] = float_to_e4m3(packkv::detail::is_finite(x[c]) ? u : packkv::detail::nan_float());
    } else {
      const std::uint16_t bits = spec.kind == codec_kind::float16 ? float_to_half(x[c]) : float_to_bfloat16(x[c]);
      const float stored = spec.kind == codec_kind::float16 ? half_to_float(bits) : bfloat16_to_float(bits);
      if (finite && !packkv::detail::is_finite(stored)) report.flags |= report_scale_overflow;
      detail::store_bits(tile, 2 * at, bits);
    }
  }
}

/// Reconstructs token `token` of a tile into head_dim floats, in the original basis.
inline void decode_token(const codec_spec& spec, const head_parameters& head, const std::uint8_t* tile, int token,
                         float* x) {
  using namespace packkv::detail;
  if (spec.kind == codec_kind::plan) {
    const std::uint32_t* words = reinterpret_cast<const std::uint32_t*>(tile);
    const float row = half_to_float(detail::load_bits(tile, spec.code_bytes() + 2 * row_slot(token)));
    float y[max_head_dim];
    for (int c = 0; c < spec.head_dim; ++c) {
      if (c < spec.leading) {
        std::int8_t q;
        std::memcpy(&q, tile + spec.leading_offset() + c * tile_tokens + row_slot(token), 1);
        y[c] = is_nan(row) ? row : mul_rn(head.leading_scale[c], static_cast<float>(q));
        continue;
      }
      const code_place place = locate(spec.strips, token, c);
      y[c] = place.width == 0
                 ? (is_nan(row) ? row : 0.0f)
                 : decode_element(read_code(words, place), mul_rn(row, column_of(head, place.width, c)), place.width);
    }
    transform_inverse(spec.transform, head.transform(), spec.head_dim, y, x);
    for (int c = 0; c < spec.head_dim && head.channel_offset != nullptr; ++c) x[c] = add_rn(x[c], head.offset(c));
    return;
  }
  for (int c = 0; c < spec.head_dim; ++c) {
    const std::int64_t at = static_cast<std::int64_t>(token) * spec.head_dim + c;
    switch (spec.kind) {
      case codec_kind::fp8:
        x[c] = mul_rn(e4m3_to_float(tile[at]), head.tensor_scale);
        break;
      case codec_kind::bfloat16:
        x[c] = bfloat16_to_float(detail::load_bits(tile, 2 * at));
        break;
      default:
        x[c] = half_to_float(detail::load_bits(tile, 2 * at));
        break;
    }
  }
}

}  // namespace packkv::reference

// SPDX-License-Identifier: Apache-2.0
// PackKV's quantiser, one element at a time: step and zero point of a group, code, reconstruction.
// One idea: both directions start from the stored range, and every operation rounds once, so host and device agree.
//   const pack_step s = make_pack_step(codec, low, high);   float x = decode_code(codec, s, code);
#pragma once

#include <cmath>
#include <cstdint>
#include <packkv/codec/pack_format.hpp>
#include <packkv/core/views.hpp>
#include <packkv/detail/arith.hpp>

namespace packkv {

inline constexpr int max_pack_code = 255;  ///< codes have at most 8 bits

/// What a group's elements are divided by and shifted by.
struct pack_step {
  float scale = 0.0f;  ///< 0: all elements of the group are equal
  float zero = 0.0f;   ///< integer zero point: round(low / scale); floating: low
  float low = 0.0f;    ///< smallest element
};

/// scale = (high - low) * r in float; zero = round(low / scale), ties to even, or low.
PACKKV_HOST_DEVICE inline pack_step make_pack_step(const pack_codec& codec, float low, float high) {
  pack_step s;
  s.low = low;
  s.scale = detail::mul_rn(detail::sub_rn(high, low), codec.relative_step);
  if (codec.zero == pack_zero::floating)
    s.zero = low;
  else if (s.scale > 0.0f)
    s.zero = rintf(detail::div_rn(low, s.scale));
  return s;
}

/// Code of x as a float: round(x / scale) - zero, or round((x - low) / scale); 0 in a group of equal elements.
PACKKV_HOST_DEVICE inline float encode_code(const pack_codec& codec, const pack_step& s, float x) {
  if (!(s.scale > 0.0f)) return 0.0f;
  return codec.zero == pack_zero::integer ? rintf(detail::div_rn(x, s.scale)) - s.zero
                                          : rintf(detail::div_rn(detail::sub_rn(x, s.low), s.scale));
}

/// (code + zero) * scale, or code * scale + low; low itself in a group of equal elements.
PACKKV_HOST_DEVICE inline float decode_code(const pack_codec& codec, const pack_step& s, int code) {
  if (!(s.scale > 0.0f)) return s.low;
  return codec.zero == pack_zero::integer ? detail::mul_rn(static_cast<float>(code) + s.zero, s.scale)
                                          : detail::add_rn(detail::mul_rn(static_cast<float>(code), s.scale), s.low);
}

/// x^ = code * scale + offset, with the integer zero point in the offset; in double, where the product is exact.
struct pack_affine {
  double scale = 0.0, offset = 0.0;
};
/// Of a group with that step.
PACKKV_HOST_DEVICE inline pack_affine make_pack_affine(const pack_codec& codec, const pack_step& s) {
  if (!(s.scale > 0.0f)) return {0.0, static_cast<double>(s.low)};
  const double scale = static_cast<double>(s.scale);
  return {scale, codec.zero == pack_zero::integer ? scale * static_cast<double>(s.zero) : static_cast<double>(s.low)};
}

/// The value of a stored range's bits.
PACKKV_HOST_DEVICE inline float range_value(dtype element, std::uint16_t bits) {
  return element == dtype::float16 ? half_to_float(bits) : bfloat16_to_float(bits);
}
/// The bits of an element; both zeros are stored as +0.
PACKKV_HOST_DEVICE inline std::uint16_t range_bits(dtype element, float x) {
  if (x == 0.0f) return 0;
  return element == dtype::float16 ? float_to_half(x) : float_to_bfloat16(x);
}

/// Bits of a 16-bit element as an integer that orders as the numbers do (-0 before +0), and back.
PACKKV_HOST_DEVICE inline std::int16_t ordered_bits(std::uint16_t bits) {
  const std::int16_t x = static_cast<std::int16_t>(bits);
  return static_cast<std::int16_t>(x ^ ((x >> 15) & 0x7fff));
}
/// The element of ordered_bits().
PACKKV_HOST_DEVICE inline std::uint16_t element_bits(std::int16_t ordered) {
  const std::uint16_t bits = static_cast<std::uint16_t>(ordered ^ ((ordered >> 15) & 0x7fff));
  return bits == 0x8000u ? std::uint16_t{0} : bits;  // both zeros are stored as +0
}
/// Whether all elements from `low` to `high`, as ordered_bits(), are finite: infinities and NaNs lie beyond on both
/// sides.
PACKKV_HOST_DEVICE inline bool are_finite_bits(dtype element, std::int16_t low, std::int16_t high) {
  const int largest = element == dtype::float16 ? 0x7bff : 0x7f7f;
  return high <= largest && low >= -largest - 1;
}

}  // namespace packkv

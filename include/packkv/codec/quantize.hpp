// SPDX-License-Identifier: Apache-2.0
// The arithmetic of a plan codec, one element at a time: row scale, code, reconstruction.
// One idea: quantise with the scale as stored, and round every step once, so host and device agree to the bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <packkv/codec/parameters.hpp>
#include <packkv/detail/arith.hpp>

namespace packkv {

/// Step of a uniform quantiser with 2^width levels that minimises the squared error of a unit Gaussian
/// (J. Max, "Quantizing for minimum distortion", 1960, table II; width 8 continues the table).
PACKKV_HOST_DEVICE constexpr float gaussian_step(int width) {
  switch (width) {
    case 1:
      return 1.596f;
    case 2:
      return 0.996f;
    case 3:
      return 0.586f;
    case 4:
      return 0.335f;
    default:
      return 0.0308f;  // 8
  }
}

namespace detail {

/// Centre of the codes of a width: x^ = step * (code - code_centre).
PACKKV_HOST_DEVICE constexpr float code_centre(int width) { return 0.5f * static_cast<float>((1 << width) - 1); }

PACKKV_HOST_DEVICE inline float column_of(const head_parameters& p, int width, int channel) {
  return p.column_scale != nullptr ? p.column_scale[channel] : gaussian_step(width);
}

/// Row scale bits from the sum of squares of `count` channels. NaN if not finite or beyond half's range.
PACKKV_HOST_DEVICE inline std::uint16_t row_scale_bits(double sum_of_squares, int count) {
  const bool power_of_two = (count & (count - 1)) == 0;  // division is exact then, and so is a product, which is faster
  const double mean =
      power_of_two ? sum_of_squares * (1.0 / count) : div_rn(sum_of_squares, static_cast<double>(count));
  const float rms = static_cast<float>(sqrt_rn(mean));
  const std::uint16_t bits = half_bits_rn(rms);
  return bits >= 0x7c00u ? std::uint16_t{0x7fffu} : bits;
}

/// Code of y: the cell of width `step` that holds it, clamped to the outermost cells. step 0 or NaN: y counts as 0.
PACKKV_HOST_DEVICE inline std::uint32_t encode_element(float y, float step, int width) {
  const float half = static_cast<float>(1 << (width - 1));
  float u = step > 0.0f ? div_rn(y, step) : 0.0f;
  u = u < -half ? -half : u > half - 0.5f ? half - 0.5f : u;
  return static_cast<std::uint32_t>(static_cast<int>(floorf(u)) + (1 << (width - 1)));
}

PACKKV_HOST_DEVICE inline float decode_element(std::uint32_t code, float step, int width) {
  return mul_rn(step, static_cast<float>(code) - code_centre(width));
}

/// Leading component: signed 8-bit multiple of its scale, nearest even, clamped to +-127.
PACKKV_HOST_DEVICE inline std::int8_t encode_leading(float y, float scale, bool& clamped) {
  const float u = rintf(div_rn(y, scale));
  clamped = u < -127.0f || u > 127.0f;
  return static_cast<std::int8_t>(u < -127.0f ? -127.0f : u > 127.0f ? 127.0f : u);
}

}  // namespace detail
}  // namespace packkv

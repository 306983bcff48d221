// SPDX-License-Identifier: Apache-2.0
// The arithmetic of a group: scale and minimum from its elements, code of an element, reconstruction.
// One idea: the stored fp16 minimum lies at or below every element and the stored step reaches the largest, so a
// min-max code is never clamped and |x - x^| <= step / 2.
//   group_scale g = min_max_scale(lowest, highest, width);   code = encode_in(spec, g, y);   y^ = decode_in(spec, g,
//   code);
#pragma once

#include <cmath>
#include <cstdint>
#include <packkv/codec/grouped.hpp>
#include <packkv/codec/quantize.hpp>

namespace packkv::detail {

/// The least fp16 number that is >= x, for x >= 0; infinity beyond the range.
PACKKV_HOST_DEVICE inline std::uint16_t half_not_below(float x) {
  const std::uint16_t bits = float_to_half(x);
  return half_to_float(bits) < x ? static_cast<std::uint16_t>(bits + 1) : bits;
}
/// The greatest fp16 number that is <= x; minus infinity beyond the range.
PACKKV_HOST_DEVICE inline std::uint16_t half_not_above(float x) {
  const std::uint16_t bits = float_to_half(x);
  if (!(half_to_float(bits) > x)) return bits;
  return static_cast<std::uint16_t>((bits & 0x8000u) != 0 ? bits + 1 : bits - 1);
}

/// What a group stores, as fp16 bits. A group that cannot be coded is NaN in both.
struct group_scale {
  std::uint16_t scale = 0x7fffu;
  std::uint16_t minimum = 0x7fffu;
  PACKKV_HOST_DEVICE bool valid() const { return scale != 0x7fffu; }
};

PACKKV_HOST_DEVICE inline bool is_finite_half(std::uint16_t bits) { return (bits & 0x7c00u) != 0x7c00u; }

/// step_rule::min_max of a group whose elements are finite.
PACKKV_HOST_DEVICE inline group_scale min_max_scale(float lowest, float highest, int width) {
  const std::uint16_t minimum = half_not_above(lowest == 0.0f ? 0.0f : lowest);
  if (!is_finite_half(minimum)) return {};
  const float range = sub_rn(highest, half_to_float(minimum));
  const std::uint16_t scale = half_not_below(div_rn(range, static_cast<float>(top_code(width))));
  return is_finite_half(scale) ? group_scale{scale, minimum} : group_scale{};
}

/// step_rule::gaussian: the RMS from the sum of squares of `count` elements.
PACKKV_HOST_DEVICE inline group_scale rms_group_scale(double sum_of_squares, int count) {
  const std::uint16_t bits = row_scale_bits(sum_of_squares, count);
  return bits == 0x7fffu ? group_scale{} : group_scale{bits, 0};
}

/// step_rule::gaussian_mean: levels around `mean`, from the sum of squared distances to it.
PACKKV_HOST_DEVICE inline group_scale mean_group_scale(float mean, double sum_of_squares, int count, int width) {
  const float deviation = static_cast<float>(sqrt_rn(div_rn(sum_of_squares, static_cast<double>(count))));
  const std::uint16_t scale = float_to_half(mul_rn(deviation, gaussian_step(width)));
  if (!is_finite_half(scale)) return {};
  const std::uint16_t minimum = float_to_half(sub_rn(mean, mul_rn(code_centre(width), half_to_float(scale))));
  return is_finite_half(minimum) ? group_scale{scale, minimum} : group_scale{};
}

/// The numbers of a group as a decoder uses them: x^ = step * code + minimum.
struct group_values {
  float step;
  float minimum;
};
PACKKV_HOST_DEVICE inline group_values values_of(const grouped_spec& spec, group_scale g) {
  const float scale = half_to_float(g.scale);
  if (spec.has_minima()) return {scale, half_to_float(g.minimum)};
  const float step = mul_rn(scale, gaussian_step(spec.width));
  return {step, mul_rn(step, -code_centre(spec.width))};
}

/// Code of y in its group; 0 in a group that is not valid.
PACKKV_HOST_DEVICE inline std::uint32_t encode_in(const grouped_spec& spec, group_scale g, float y) {
  if (!g.valid()) return 0;
  const group_values v = values_of(spec, g);
  if (!spec.has_minima()) return encode_element(y, v.step, spec.width);
  const float top = static_cast<float>(top_code(spec.width));
  const float u = v.step > 0.0f ? rintf(div_rn(sub_rn(y, v.minimum), v.step)) : 0.0f;
  return static_cast<std::uint32_t>(u < 0.0f ? 0.0f : u > top ? top : u);
}

/// Reconstruction of a code; NaN in a group that is not valid.
PACKKV_HOST_DEVICE inline float decode_in(const grouped_spec& spec, group_values v, std::uint32_t code) {
  if (!spec.has_minima()) return decode_element(code, v.step, spec.width);
  return add_rn(mul_rn(v.step, static_cast<float>(code)), v.minimum);
}

/// fp16 bits of the mean of a channel over the first `tokens` tokens of x [heads, tokens, head_dim]; 0 where it is not
/// finite.
PACKKV_HOST_DEVICE inline std::uint16_t channel_mean_bits(const input_view<3>& x, std::int64_t head,
                                                          std::int64_t channel, std::int64_t tokens) {
  double sum = 0.0;
  for (std::int64_t t = 0; t < tokens; ++t) sum += static_cast<double>(load_element(address(x, head, t, channel), x.type));
  const std::uint16_t bits =
      tokens > 0 ? float_to_half(static_cast<float>(div_rn(sum, static_cast<double>(tokens)))) : std::uint16_t{0};
  return is_finite_half(bits) ? bits : std::uint16_t{0};
}

}  // namespace packkv::detail

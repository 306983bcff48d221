// SPDX-License-Identifier: Apache-2.0
// The arithmetic of a group: what it stores of its elements, code of an element, reconstruction.
// One idea: min-max groups store fp16 bounds of their elements and both directions compute the step from them in float,
// so no code is clamped and |x - x^| <= step / 2; elements that fp16 holds see the published arithmetic.
//   group_numbers n = min_max_numbers(lowest, highest);   group_values v = values_of(spec, n);
//   code = encode_in(spec, v, y);   y^ = decode_in(spec, v, code);
#pragma once

#include <cmath>
#include <cstdint>
#include <packkv/codec/grouped.hpp>
#include <packkv/codec/quantize.hpp>

namespace packkv::detail {

/// The greatest fp16 number that is <= x; minus infinity beyond the range. Zero is +0.
PACKKV_HOST_DEVICE inline std::uint16_t half_not_above(float x) {
  const std::uint16_t bits = float_to_half(x == 0.0f ? 0.0f : x);
  if (!(half_to_float(bits) > x)) return bits;
  return static_cast<std::uint16_t>((bits & 0x8000u) != 0 ? bits + 1 : bits - 1);
}
/// The least fp16 number that is >= x; infinity beyond the range. Zero is +0.
PACKKV_HOST_DEVICE inline std::uint16_t half_not_below(float x) {
  const std::uint16_t bits = half_not_above(-x);
  return (bits & 0x7fffu) == 0 ? std::uint16_t{0} : static_cast<std::uint16_t>(bits ^ 0x8000u);
}

PACKKV_HOST_DEVICE inline bool is_finite_half(std::uint16_t bits) { return (bits & 0x7c00u) != 0x7c00u; }

/// What a group stores, as fp16 bits. A group that cannot be coded is NaN in both.
struct group_numbers {
  std::uint16_t first = 0x7fffu;    ///< min_max: the maximum; gaussian, gaussian_mean: the scale
  std::uint16_t minimum = 0x7fffu;  ///< only where has_minima()
  PACKKV_HOST_DEVICE bool valid() const { return first != 0x7fffu; }
};

/// step_rule::min_max of a group whose elements are finite: bounds of them in fp16.
PACKKV_HOST_DEVICE inline group_numbers min_max_numbers(float lowest, float highest) {
  const group_numbers n{half_not_below(highest), half_not_above(lowest)};
  return is_finite_half(n.first) && is_finite_half(n.minimum) ? n : group_numbers{};
}

/// step_rule::gaussian: the RMS from the sum of squares of `count` elements.
PACKKV_HOST_DEVICE inline group_numbers rms_numbers(double sum_of_squares, int count) {
  const std::uint16_t bits = row_scale_bits(sum_of_squares, count);
  return bits == 0x7fffu ? group_numbers{} : group_numbers{bits, 0};
}

/// step_rule::gaussian_mean: levels around `mean`, from the sum of squared distances to it.
PACKKV_HOST_DEVICE inline group_numbers mean_numbers(float mean, double sum_of_squares, int count, int width) {
  const float deviation = static_cast<float>(sqrt_rn(div_rn(sum_of_squares, static_cast<double>(count))));
  const std::uint16_t scale = float_to_half(mul_rn(deviation, gaussian_step(width)));
  if (!is_finite_half(scale)) return {};
  const std::uint16_t minimum = float_to_half(sub_rn(mean, mul_rn(code_centre(width), half_to_float(scale))));
  return is_finite_half(minimum) ? group_numbers{scale, minimum} : group_numbers{};
}

/// The numbers of a group as codes use them: x^ = step * (code + zero) + minimum. NaN in a group that is not valid.
struct group_values {
  float step;
  float minimum;
  float zero = 0.0f;  ///< an integer; not 0 in strip-adaptive groups with an integer zero point alone

  /// What code 0 stands for, exact.
  double offset() const { return static_cast<double>(step) * static_cast<double>(zero) + static_cast<double>(minimum); }
};

/// step_rule::min_max.
PACKKV_HOST_DEVICE inline group_values min_max_values(int width, group_numbers n) {
  const float maximum = half_to_float(n.first), minimum = half_to_float(n.minimum);
  // Finite fp16 numbers differ by at most 131008.
  return {div_rn(sub_rn(maximum, minimum), static_cast<float>(top_code(width))), minimum};
}
PACKKV_HOST_DEVICE inline group_values values_of(const grouped_spec& spec, group_numbers n) {
  if (spec.step == step_rule::min_max) return min_max_values(spec.width, n);
  const float first = half_to_float(n.first), minimum = half_to_float(n.minimum);
  if (spec.step == step_rule::gaussian_mean) return {first, minimum};
  const float step = mul_rn(first, gaussian_step(spec.width));
  return {step, mul_rn(step, -code_centre(spec.width))};
}

/// round((y - minimum) / step) - zero, ties to even, in 0 .. top; 0 where the step is 0 or NaN.
PACKKV_HOST_DEVICE inline std::uint32_t code_above(group_values v, float y, int top) {
  const float u = v.step > 0.0f ? rintf(div_rn(sub_rn(y, v.minimum), v.step)) - v.zero : 0.0f;
  const float most = static_cast<float>(top);
  return static_cast<std::uint32_t>(u > 0.0f ? u > most ? most : u : 0.0f);
}

/// Code of y in its group; 0 in a group that is not valid.
PACKKV_HOST_DEVICE inline std::uint32_t encode_in(const grouped_spec& spec, group_values v, float y) {
  if (spec.has_minima()) return code_above(v, y, top_code(spec.width));
  return is_nan(v.step) ? 0u : encode_element(y, v.step, spec.width);
}

/// Reconstruction of a code of a group with a minimum; NaN in a group that is not valid.
PACKKV_HOST_DEVICE inline float decode_between(group_values v, std::uint32_t code) {
  return add_rn(mul_rn(v.step, static_cast<float>(code) + v.zero), v.minimum);
}
/// Reconstruction of a code; NaN in a group that is not valid.
PACKKV_HOST_DEVICE inline float decode_in(const grouped_spec& spec, group_values v, std::uint32_t code) {
  if (!spec.has_minima()) return decode_element(code, v.step, spec.width);
  return decode_between(v, code);
}

/// fp16 bits of the mean of a channel over the first `tokens` tokens of x [heads, tokens, head_dim]; 0 where it is not
/// finite.
PACKKV_HOST_DEVICE inline std::uint16_t channel_mean_bits(const input_view<3>& x, std::int64_t head,
                                                          std::int64_t channel, std::int64_t tokens) {
  double sum = 0.0;
  for (std::int64_t t = 0; t < tokens; ++t)
    sum += static_cast<double>(load_element(address(x, head, t, channel), x.type));
  const std::uint16_t bits =
      tokens > 0 ? float_to_half(static_cast<float>(div_rn(sum, static_cast<double>(tokens)))) : std::uint16_t{0};
  return is_finite_half(bits) ? bits : std::uint16_t{0};
}

}  // namespace packkv::detail

// SPDX-License-Identifier: Apache-2.0
// The arithmetic of a strip-adaptive group and the parts of its tile; host and device.
// One idea: a group stores its bounds as step_rule::min_max does; step = (max - min) x relative_step in float and, with
// an integer zero point, zero = round(min / step): PackKV's arithmetic (pack_quantize.hpp). A code is what decode_in
// takes: the strip's base and the stored code together.
//   group_values v = values_of(spec, min_max_numbers(lowest, highest));   code = encode_in(spec, v, y);
#pragma once

#include <cstdint>
#include <packkv/codec/grouped_quantize.hpp>
#include <packkv/codec/pages.hpp>
#include <packkv/codec/strip_adaptive.hpp>

namespace packkv::detail {

inline constexpr int max_adaptive_code = 255;

PACKKV_HOST_DEVICE inline group_values values_of(const adaptive_spec& spec, group_numbers n) {
  const float minimum = half_to_float(n.minimum);
  const float step = mul_rn(sub_rn(half_to_float(n.first), minimum), spec.relative_step);
  if (spec.zero == pack_zero::floating || !(step > 0.0f)) return {step, minimum};
  return {step, 0.0f, rintf(div_rn(minimum, step))};  // below 2^20: exact, and so is code + zero
}
/// Code of y in its group, 0..255; 0 in a group that is not valid. Larger ones become 255.
PACKKV_HOST_DEVICE inline std::uint32_t encode_in(const adaptive_spec&, group_values v, float y) {
  return code_above(v, y, max_adaptive_code);
}
/// Reconstruction of a code; NaN in a group that is not valid.
PACKKV_HOST_DEVICE inline float decode_in(const adaptive_spec& spec, group_values v, std::uint32_t code) {
  return decode_in(spec.groups, v, code);
}

/// What is to be reported of a group. `finite`: the elements it comes from are; `highest`: its greatest number.
PACKKV_HOST_DEVICE inline std::uint32_t report_of(const adaptive_spec& spec, group_numbers n, bool finite,
                                                  float highest) {
  if (!n.valid()) return finite ? report_scale_overflow : report_nonfinite_input;
  const bool wide = code_above(values_of(spec, n), highest, max_adaptive_code + 1) > max_adaptive_code;
  return wide ? report_code_overflow : 0u;
}

/// The strips of a tile with the given header, whose widths must be stored ones.
PACKKV_HOST_DEVICE inline strip_layout strips_of(const adaptive_spec& spec, const std::uint8_t* header) {
  strip_widths widths;
  widths.count = spec.strip_count();
  for (int i = 0; i < widths.count; ++i) widths.width[i] = header[i];
  return make_strips(spec.groups.which, spec.groups.head_dim, widths);
}

/// Index of an element's group among those of its tile, or among those shared by the heads of its block. `token`
/// counts from the start of the tile.
PACKKV_HOST_DEVICE constexpr int group_index(const adaptive_spec& spec, int token, int channel) {
  if (spec.groups.axis == group_axis::block) return 0;
  return spec.groups.axis == group_axis::channel ? channel : row_slot(token);
}

}  // namespace packkv::detail

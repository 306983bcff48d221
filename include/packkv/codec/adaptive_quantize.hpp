// SPDX-License-Identifier: Apache-2.0
// The arithmetic of a strip-adaptive group and the parts of its tile; host and device.
// One idea: a group stores its bounds as step_rule::min_max does, and its step is (max - min) x relative_step in float:
// PackKV's floating zero point. A code is what decode_in takes: the strip's base and the stored code together.
//   group_values v = values_of(spec, min_max_numbers(lowest, highest));   code = encode_in(spec, v, y);
#pragma once

#include <cstdint>
#include <packkv/codec/grouped_quantize.hpp>
#include <packkv/codec/strip_adaptive.hpp>

namespace packkv::detail {

inline constexpr int max_adaptive_code = 255;

PACKKV_HOST_DEVICE inline group_values values_of(const adaptive_spec& spec, group_numbers n) {
  const float minimum = half_to_float(n.minimum);
  return {mul_rn(sub_rn(half_to_float(n.first), minimum), spec.relative_step), minimum};
}
/// Code of y in its group, 0..255; 0 in a group that is not valid.
PACKKV_HOST_DEVICE inline std::uint32_t encode_in(const adaptive_spec&, group_values v, float y) {
  return code_above(v, y, max_adaptive_code);
}
/// Reconstruction of a code; NaN in a group that is not valid.
PACKKV_HOST_DEVICE inline float decode_in(const adaptive_spec& spec, group_values v, std::uint32_t code) {
  return decode_in(spec.groups, v, code);
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
  return spec.groups.axis == group_axis::channel ? channel : row_slot(token);
}

}  // namespace packkv::detail

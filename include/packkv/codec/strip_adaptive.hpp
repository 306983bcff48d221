// SPDX-License-Identifier: Apache-2.0
// The `strip-adaptive` format: relative-step quantisers whose codes get, per tile and strip, the width they need.
// One idea: a strip stores its least code and the rest in the narrowest of {0,1,2,3,4,8} bits that holds it; tiles
// differ in size, so int64 offsets[tiles + 1] say where each lies.
//   adaptive_spec spec = make_adaptive(side::value, 128, group_axis::token, 0.1f);   check_adaptive(spec);
#pragma once

#include <cstdint>
#include <packkv/codec/grouped.hpp>
#include <packkv/codec/pack_format.hpp>

namespace packkv {

/// Everything that decides the bytes of a strip-adaptive format, of one side.
struct adaptive_spec {
  /// Axis, group, transform, centring as in grouped formats; min_max. Widths are the tile's
  /// own. Groups: channel 64 tokens, vector all channels of a head, token all heads, block all heads of 64 tokens.
  grouped_spec groups = {};
  float relative_step = 0.0f;  ///< step / (max - min) of a group; 1/255 to 1
  pack_zero zero = pack_zero::floating;

  PACKKV_HOST_DEVICE constexpr int strip_count() const {
    return groups.head_dim / strip_channels(groups.which, groups.head_dim);
  }
  /// Bytes of a tile's header: the strips' widths, then their least codes, padded to 16.
  PACKKV_HOST_DEVICE constexpr int header_bytes() const { return (2 * strip_count() + 15) / 16 * 16; }
  /// Maxima that lie together, with as many minima behind them: those of a tile, or of a block if heads share them.
  PACKKV_HOST_DEVICE constexpr int number_count() const {
    return groups.shared_numbers() ? static_cast<int>(groups.shared_groups(1)) : groups.tile_groups();
  }
  /// Bytes of a tile's maxima and minima.
  PACKKV_HOST_DEVICE constexpr int number_bytes() const { return 4 * groups.tile_groups(); }
};

namespace detail {

/// grouped_spec::group of the format.
PACKKV_HOST_DEVICE constexpr int adaptive_group(group_axis axis, int head_dim) {
  return axis == group_axis::channel ? tile_tokens : axis == group_axis::vector ? head_dim : 0;
}

}  // namespace detail

/// A strip-adaptive spec; check it with check_adaptive.
PACKKV_HOST_DEVICE constexpr adaptive_spec make_adaptive(side which, int head_dim, group_axis axis, float relative_step,
                                                         transform_kind transform = transform_kind::identity,
                                                         bool centred = false, pack_zero zero = pack_zero::floating) {
  return {make_grouped(which, head_dim, axis, detail::adaptive_group(axis, head_dim), 8, step_rule::min_max, transform,
                       centred),
          relative_step, zero};
}

/// Checks a spec that came from run-time data.
PACKKV_HOST_DEVICE constexpr status check_adaptive(const adaptive_spec& spec) {
  if (const status s = detail::check_groups(spec.groups); !s) return s;
  if (spec.groups.width != 8 || spec.groups.step != step_rule::min_max ||
      spec.groups.group != detail::adaptive_group(spec.groups.axis, spec.groups.head_dim))
    return refuse(status_code::invalid_argument, "the spec was not made by make_adaptive");
  if (static_cast<int>(spec.zero) > 1) return refuse(status_code::invalid_argument, "unknown zero point");
  if (!(spec.relative_step <= 1.0f) || !(spec.relative_step > 0.0f))
    return refuse(status_code::invalid_argument, "the relative step must be > 0 and at most 1");
  if (spec.relative_step < 1.0f / 255.0f)
    return refuse(status_code::unsupported, "a relative step below 1/255 needs codes wider than 8 bits");
  return {};
}

/// The narrowest stored width that holds `largest` (0..255).
PACKKV_HOST_DEVICE constexpr int stored_width(int largest) {
  return largest == 0 ? 0 : largest < 2 ? 1 : largest < 4 ? 2 : largest < 8 ? 3 : largest < 16 ? 4 : 8;
}

/// Where the parts of one coded side lie: means, 16-bit tail, numbers shared by heads, tiles. In bytes from a start
/// that is a multiple of 16; every part but the tiles has a size known beforehand.
struct adaptive_layout {
  std::int64_t heads = 0, tokens = 0, coded_tokens = 0;
  std::int64_t blocks = 0;         ///< of 64 tokens; tile of head h of block b: b * heads + h
  std::int64_t tiles = 0;          ///< blocks * heads
  std::int64_t tail_offset = 0;    ///< [heads, tokens - coded_tokens, head_dim]
  std::int64_t shared_offset = 0;  ///< per block, maxima and minima that heads share: 64 (token), 1 (block) or none
  std::int64_t tiles_offset = 0;
  std::int64_t max_bytes = 0;  ///< upper bound of all bytes but the offsets
};

/// Lays out `tokens` tokens of which at least the newest `recent` stay 16-bit; so do those that fill no tile.
inline status make_adaptive_layout(const adaptive_spec& spec, std::int64_t heads, std::int64_t tokens,
                                   std::int64_t recent, adaptive_layout& layout) {
  if (const status s = check_adaptive(spec); !s) return s;
  grouped_layout g;
  if (const status s = detail::lay_out_groups(spec.groups, heads, tokens, recent, g); !s) return s;
  adaptive_layout l;
  l.heads = heads;
  l.tokens = tokens;
  l.coded_tokens = g.coded_tokens;
  l.blocks = g.blocks;
  l.tiles = g.blocks * heads;
  l.tail_offset = g.blocks_offset;
  l.shared_offset = l.tail_offset + g.total_bytes - g.tail_offset;
  l.tiles_offset = l.shared_offset + l.blocks * spec.groups.shared_bytes(heads);
  const checked bound = checked(l.tiles_offset) + checked(l.tiles) * (spec.header_bytes() + spec.groups.tile_bytes());
  if (!bound.valid()) return refuse(status_code::overflow, "the coded tensor does not fit 63 bits");
  l.max_bytes = bound.value();
  layout = l;
  return {};
}

/// Bytes of all that is stored when the tiles end at `size`: the buffer and the offsets.
inline std::int64_t adaptive_total_bytes(const adaptive_layout& layout, std::int64_t size) {
  return size + 8 * (layout.tiles + 1);
}

}  // namespace packkv

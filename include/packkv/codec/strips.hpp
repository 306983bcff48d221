// SPDX-License-Identifier: Apache-2.0
// Plans and strips: how many bits each group of channels gets, and where each strip's words begin in a tile.
// One idea: a plan is data that the compiler can fold; the same functions serve a static and a run-time plan.
//   constexpr auto strips = packkv::make_strips(packkv::side::key, 128, packkv::plan<4, 2, 1, 1>::widths());
#pragma once

#include <cstdint>
#include <packkv/core/config.hpp>
#include <packkv/core/status.hpp>

namespace packkv {

inline constexpr int tile_tokens = 64;    ///< tokens of a tile
inline constexpr int max_head_dim = 512;  ///< largest head dim
inline constexpr int max_strips = 32;     ///< strips of a value tile of the largest head dim
inline constexpr int max_leading = 4;     ///< leading key components kept in 8 bits

/// Which tensor of the cache a codec is for: the two sides order their bits differently.
enum class side : std::uint8_t { key, value };

/// Head dims with kernels; anything else is refused at compile time or by a status.
PACKKV_HOST_DEVICE constexpr bool is_head_dim(int d) {
  return d == 64 || d == 96 || d == 128 || d == 192 || d == 256 || d == 512;
}

/// Channels of one strip: K 32, or 16 at head dim 64; V 16.
PACKKV_HOST_DEVICE constexpr int strip_channels(side which, int head_dim) {
  return which == side::key && head_dim != 64 ? 32 : 16;
}

/// Widths of the strips of a tile, in order of channels.
struct strip_widths {
  int count = 0;
  std::uint8_t width[max_strips] = {};
};

/// Static plan: `plan<4, 2, 1, 1>` gives four strips 4, 2, 1 and 1 bits a channel, widest first.
template <int... Width>
struct plan {
  static_assert(sizeof...(Width) >= 1 && sizeof...(Width) <= max_strips, "a plan has 1 to 32 strips");
  PACKKV_HOST_DEVICE static constexpr strip_widths widths() {
    return strip_widths{static_cast<int>(sizeof...(Width)), {static_cast<std::uint8_t>(Width)...}};
  }
};

/// Whether strips of plans may have this width.
PACKKV_HOST_DEVICE constexpr bool is_plan_width(int w) { return (w >= 0 && w <= 4) || w == 8; }

/// The strips of one tile: widths, and the word at which each strip's planes begin.
/// `low` is the strip's only plane, or the 2-bit plane of width 3; `high` is the 1-bit plane of width 3.
struct strip_layout {
  side which = side::key;
  std::int16_t channels = 0;  ///< channels of a strip
  std::int16_t count = 0;     ///< strips
  std::int32_t words = 0;     ///< 32-bit words of all codes of a tile
  std::uint8_t width[max_strips] = {};
  std::uint16_t low[max_strips] = {};
  std::uint16_t high[max_strips] = {};
};

/// Checks a plan against a side and head dim: strip count, widths {0,1,2,3,4,8}, widest first.
PACKKV_HOST_DEVICE constexpr status check_plan(side which, int head_dim, const strip_widths& widths) {
  if (!is_head_dim(head_dim)) return refuse(status_code::unsupported, "head_dim must be 64, 96, 128, 192, 256 or 512");
  if (widths.count != head_dim / strip_channels(which, head_dim))
    return refuse(status_code::invalid_argument,
                  "a plan has one width per strip: K head_dim/32 (head_dim 64: 4), V head_dim/16",
                  head_dim / strip_channels(which, head_dim));
  for (int i = 0; i < widths.count; ++i) {
    if (!is_plan_width(widths.width[i]))
      return refuse(status_code::invalid_argument, "a plan takes the widths 0, 1, 2, 3, 4 and 8", widths.width[i]);
    if (i > 0 && widths.width[i] > widths.width[i - 1])
      return refuse(status_code::invalid_argument, "a plan lists its strips widest first", i);
  }
  return {};
}

/// The same width, 1, 2, 3, 4 or 8, in every strip; no strips for what is no such width or no head dim.
PACKKV_HOST_DEVICE constexpr strip_widths uniform_widths(side which, int head_dim, int width) {
  strip_widths widths;
  if (!is_head_dim(head_dim) || width < 1 || !is_plan_width(width)) return widths;
  widths.count = head_dim / strip_channels(which, head_dim);
  for (int i = 0; i < widths.count; ++i) widths.width[i] = static_cast<std::uint8_t>(width);
  return widths;
}

/// Places the strips of a valid plan (docs/format.md, "Code words"); what it makes of others, check_codec refuses.
PACKKV_HOST_DEVICE constexpr strip_layout make_strips(side which, int head_dim, const strip_widths& widths) {
  strip_layout s;
  s.which = which;
  s.channels = static_cast<std::int16_t>(strip_channels(which, head_dim));
  s.count = static_cast<std::int16_t>(widths.count);
  if (widths.count < 0 || widths.count > max_strips) return s;
  for (int i = 0; i < widths.count; ++i) s.width[i] = widths.width[i];
  const int plane = 2 * s.channels;  // words of one bit plane of a strip: 64 tokens x channels / 32
  int next = 0;
  const auto place = [&](std::uint16_t& at, int bits) {
    at = static_cast<std::uint16_t>(next);
    next += bits * plane;
  };
  if (which == side::key) {  // strip by strip, the planes of a width-3 strip one after the other
    for (int i = 0; i < s.count; ++i) {
      place(s.low[i], s.width[i] == 3 ? 2 : s.width[i]);
      if (s.width[i] == 3) place(s.high[i], 1);
    }
  } else {  // section by section: bytes, nibbles, 2-bit planes of 3s and 2s, 1-bit planes of 3s, then of 1s
    for (int i = 0; i < s.count; ++i)
      if (s.width[i] == 8) place(s.low[i], 8);
    for (int i = 0; i < s.count; ++i)
      if (s.width[i] == 4) place(s.low[i], 4);
    for (int i = 0; i < s.count; ++i)
      if (s.width[i] == 3 || s.width[i] == 2) place(s.low[i], 2);
    for (int i = 0; i < s.count; ++i)
      if (s.width[i] == 3) place(s.high[i], 1);
    for (int i = 0; i < s.count; ++i)
      if (s.width[i] == 1) place(s.low[i], 1);
  }
  s.words = next;
  return s;
}

namespace detail {

/// Whether code words lie at the same places: a layout that came as data, and the one that make_strips makes.
PACKKV_HOST_DEVICE constexpr bool same_layout(const strip_layout& a, const strip_layout& b) {
  bool same = a.which == b.which && a.channels == b.channels && a.count == b.count && a.words == b.words;
  for (int i = 0; i < max_strips; ++i)
    same = same && a.width[i] == b.width[i] && a.low[i] == b.low[i] && a.high[i] == b.high[i];
  return same;
}

}  // namespace detail
}  // namespace packkv

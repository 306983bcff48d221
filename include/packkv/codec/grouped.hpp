// SPDX-License-Identifier: Apache-2.0
// The `grouped` formats: codes of one fixed width with one or two 16-bit numbers per group of elements.
// One idea: a format is where its groups lie (axis, size) and how a group's step is found; codes keep the plan's bit
// map.
//   grouped_spec k = kivi_keys(128, 2), v = kivi_values(128, 2);   if (status s = check_grouped(k); !s) return s;
#pragma once

#include <cstdint>
#include <packkv/codec/layout.hpp>
#include <packkv/codec/transform.hpp>
#include <packkv/core/views.hpp>

namespace packkv {

/// Which elements share a step.
enum class group_axis : std::uint8_t {
  channel,  ///< `group` consecutive tokens (32, 64 or 128) of one channel of one head
  vector,   ///< `group` consecutive channels of one token of one head; group = head_dim: the whole vector
  token,    ///< all channels of all KV heads of one token; the numbers are stored once per token
  block,    ///< all channels, tokens and KV heads of a block; of the strip-adaptive format alone
};

/// How the step of a group is found.
enum class step_rule : std::uint8_t {
  min_max,        ///< step (max - min) / (2^width - 1), stored as maximum and minimum: KIVI, Liu et al., 2024,
                  ///< section 3
  gaussian,       ///< step gaussian_step(width) x root mean square, centred on 0: a scale alone
  gaussian_mean,  ///< step gaussian_step(width) x standard deviation, centred on the group's mean: step and the number
                  ///< of code 0
};

/// Everything that decides the bytes of a grouped format, of one side.
struct grouped_spec {
  side which = side::key;
  group_axis axis = group_axis::vector;
  step_rule step = step_rule::min_max;
  transform_kind transform = transform_kind::identity;  ///< identity or hadamard, applied before the groups are formed
  bool centred = false;       ///< each channel's mean over the coded tokens is subtracted first and stored once
  std::int16_t head_dim = 0;  ///< channels of a head
  std::int16_t width = 0;     ///< bits of a code: 1, 2, 3, 4 or 8
  std::int16_t group = 0;     ///< channel: tokens of a group; vector: channels of a group; token, block: 0
  strip_layout strips = {};   ///< `width` in every strip

  /// A block is what is coded at once: 64 tokens of all heads, 128 where a group spans two tiles.
  PACKKV_HOST_DEVICE constexpr int block_tokens() const {
    return axis == group_axis::channel && group > tile_tokens ? group : tile_tokens;
  }
  PACKKV_HOST_DEVICE constexpr int tiles_per_block() const { return block_tokens() / tile_tokens; }
  /// Groups reach over all KV heads.
  PACKKV_HOST_DEVICE constexpr bool spans_heads() const {
    return axis == group_axis::token || axis == group_axis::block;
  }
  /// Groups reach over more than one tile; their numbers lie beside the tiles of a block.
  PACKKV_HOST_DEVICE constexpr bool shared_numbers() const { return spans_heads() || block_tokens() > tile_tokens; }
  /// A group stores two numbers: maximum (min_max) or scale, then minimum. Else a scale alone.
  PACKKV_HOST_DEVICE constexpr bool has_minima() const { return step != step_rule::gaussian; }
  PACKKV_HOST_DEVICE constexpr int code_bytes() const { return strips.words * 4; }
  /// Groups of one tile whose numbers lie in the tile.
  PACKKV_HOST_DEVICE constexpr int tile_groups() const {
    if (shared_numbers()) return 0;
    return axis == group_axis::channel ? tile_tokens / group * head_dim : tile_tokens * (head_dim / group);
  }
  /// Bytes of a tile: codes, first numbers, minima. A multiple of 16.
  PACKKV_HOST_DEVICE constexpr int tile_bytes() const {
    return code_bytes() + 2 * tile_groups() * (has_minima() ? 2 : 1);
  }
  /// Groups of one block whose numbers lie beside its tiles.
  PACKKV_HOST_DEVICE constexpr std::int64_t shared_groups(std::int64_t heads) const {
    if (!shared_numbers()) return 0;
    return axis == group_axis::token ? tile_tokens : axis == group_axis::block ? 1 : heads * head_dim;
  }
  /// Bytes of their numbers, a multiple of 16.
  PACKKV_HOST_DEVICE constexpr std::int64_t shared_bytes(std::int64_t heads) const {
    return (2 * shared_groups(heads) * (has_minima() ? 2 : 1) + 15) / 16 * 16;
  }
  /// Bytes of a block of `heads` KV heads. A multiple of 16.
  PACKKV_HOST_DEVICE constexpr std::int64_t block_bytes(std::int64_t heads) const {
    return heads * tiles_per_block() * tile_bytes() + shared_bytes(heads);
  }
};

inline constexpr int max_grouped_heads = 1 << 16;  ///< KV heads of one call

/// Largest code.
PACKKV_HOST_DEVICE constexpr int top_code(int width) { return (1 << width) - 1; }

namespace detail {

/// What holds for the groups of every format that has them.
PACKKV_HOST_DEVICE constexpr status check_groups(const grouped_spec& spec) {
  if (!is_head_dim(spec.head_dim))
    return refuse(status_code::unsupported, "head_dim must be 64, 96, 128, 192, 256 or 512", spec.head_dim);
  if (static_cast<int>(spec.which) > 1 || static_cast<int>(spec.axis) > 3 || static_cast<int>(spec.step) > 2)
    return refuse(status_code::invalid_argument, "unknown side, group axis or step rule");
  if (spec.width > 8) return refuse(status_code::unsupported, "codes wider than 8 bits are not stored", spec.width);
  if (spec.width < 1 || !is_plan_width(spec.width))
    return refuse(status_code::unsupported, "grouped codes have 1, 2, 3, 4 or 8 bits", spec.width);
  if (spec.transform != transform_kind::identity && spec.transform != transform_kind::hadamard)
    return refuse(status_code::unsupported, "grouped formats take the identity or the Hadamard transform");
  if (spec.axis == group_axis::channel && spec.group != 32 && spec.group != 64 && spec.group != 128)
    return refuse(status_code::unsupported, "a group along tokens has 32, 64 or 128 of them", spec.group);
  if (spec.axis == group_axis::vector && (spec.group < 16 || spec.group % 16 != 0 || spec.head_dim % spec.group != 0))
    return refuse(status_code::unsupported, "a group of channels is a multiple of 16 that divides head_dim",
                  spec.group);
  if (spec.spans_heads() && spec.group != 0)
    return refuse(status_code::invalid_argument, "groups over all heads have no group size: set it to 0", spec.group);
  const strip_widths widths = uniform_widths(spec.which, spec.head_dim, spec.width);
  const bool placed = same_layout(spec.strips, make_strips(spec.which, spec.head_dim, widths));
  if (!placed) return refuse(status_code::invalid_argument, "a spec's strips were not placed by make_grouped");
  return {};
}

}  // namespace detail

/// Checks a spec that came from run-time data.
PACKKV_HOST_DEVICE constexpr status check_grouped(const grouped_spec& spec) {
  if (spec.axis == group_axis::block)
    return refuse(status_code::unsupported, "only the strip-adaptive format has one group for a block");
  return detail::check_groups(spec);
}

/// A grouped format from run-time data; check it with check_grouped.
PACKKV_HOST_DEVICE constexpr grouped_spec make_grouped(side which, int head_dim, group_axis axis, int group, int width,
                                                       step_rule step = step_rule::min_max,
                                                       transform_kind transform = transform_kind::identity,
                                                       bool centred = false) {
  grouped_spec spec;
  spec.which = which;
  spec.axis = axis;
  spec.step = step;
  spec.transform = transform;
  spec.centred = centred;
  const bool known = is_head_dim(head_dim);
  spec.head_dim = static_cast<std::int16_t>(known ? head_dim : 0);
  spec.width = static_cast<std::int16_t>(width < 0 || width > 1000 ? 1000 : width);
  spec.group = static_cast<std::int16_t>(group < 0 || group > max_head_dim ? -1 : group);
  const strip_widths widths = uniform_widths(which, head_dim, width);
  if (widths.count > 0) spec.strips = make_strips(which, head_dim, widths);
  return spec;
}

/// KIVI (Liu et al., "KIVI: a tuning-free asymmetric 2bit quantization for KV cache", 2024): K per channel over `group`
/// tokens, V per token over `group` channels, min-max. Its newest 128 tokens stay 16-bit: pass kivi_recent to the
/// calls.
PACKKV_HOST_DEVICE constexpr grouped_spec kivi_keys(int head_dim, int width, int group = 32) {
  return make_grouped(side::key, head_dim, group_axis::channel, group, width);
}
/// The values of KIVI, see kivi_keys.
PACKKV_HOST_DEVICE constexpr grouped_spec kivi_values(int head_dim, int width, int group = 32) {
  return make_grouped(side::value, head_dim, group_axis::vector, group, width);
}
/// Newest tokens that KIVI keeps in 16 bits.
inline constexpr int kivi_recent = 128;

/// Where the parts of one coded side [heads, tokens, head_dim] lie: channel means, blocks, 16-bit tail; in bytes from a
/// start that is a multiple of 16.
struct grouped_layout {
  std::int64_t heads = 0;
  std::int64_t tokens = 0;
  std::int64_t coded_tokens = 0;  ///< a multiple of block_tokens()
  std::int64_t blocks = 0;
  std::int64_t blocks_offset = 0;  ///< behind the means: fp16 [heads, head_dim], or nothing
  std::int64_t tail_offset = 0;    ///< 16-bit elements as given: [heads, tokens - coded_tokens, head_dim]
  std::int64_t total_bytes = 0;
};

namespace detail {

/// make_grouped_layout for the checked groups of any format.
inline status lay_out_groups(const grouped_spec& spec, std::int64_t heads, std::int64_t tokens, std::int64_t recent,
                             grouped_layout& layout) {
  if (heads < 1 || heads > max_grouped_heads)
    return refuse(status_code::invalid_argument, "KV heads must be 1 to 65536", heads);
  if (tokens < 0 || recent < 0) return refuse(status_code::invalid_argument, "a token count is negative");
  grouped_layout l;
  l.heads = heads;
  l.tokens = tokens;
  l.blocks = tokens > recent ? (tokens - recent) / spec.block_tokens() : 0;
  l.coded_tokens = l.blocks * spec.block_tokens();
  const std::int64_t row = heads * spec.head_dim * 2;
  const checked blocks = checked(spec.centred ? row : 0) + checked(l.blocks) * spec.block_bytes(heads);
  const checked total = blocks + checked(tokens - l.coded_tokens) * row;
  if (!total.valid()) return refuse(status_code::overflow, "the coded tensor does not fit 63 bits");
  l.blocks_offset = spec.centred ? row : 0;
  l.tail_offset = blocks.value();
  l.total_bytes = total.value();
  layout = l;
  return {};
}

}  // namespace detail

/// Lays out `tokens` tokens of which at least the newest `recent` stay 16-bit; so do those that fill no block.
inline status make_grouped_layout(const grouped_spec& spec, std::int64_t heads, std::int64_t tokens,
                                  std::int64_t recent, grouped_layout& layout) {
  if (const status s = check_grouped(spec); !s) return s;
  return detail::lay_out_groups(spec, heads, tokens, recent, layout);
}

/// Every byte of a coded side by what it holds; the first number of a group is its maximum (min_max) or its scale.
struct grouped_bytes {
  std::int64_t codes = 0, first_numbers = 0, minima = 0, means = 0, tail = 0;

  constexpr std::int64_t total() const { return codes + first_numbers + minima + means + tail; }
  constexpr std::int64_t coded() const { return codes + first_numbers + minima; }
};

/// Counts the bytes of a layout of this spec. `total()` equals `layout.total_bytes`.
inline grouped_bytes count_grouped(const grouped_spec& spec, const grouped_layout& layout) {
  const std::int64_t tiles = layout.blocks * spec.tiles_per_block() * layout.heads;
  const std::int64_t groups = tiles * spec.tile_groups() + layout.blocks * spec.shared_groups(layout.heads);
  grouped_bytes b;
  b.codes = tiles * spec.code_bytes();
  b.first_numbers = 2 * groups;
  b.minima = spec.has_minima() ? 2 * groups : 0;
  b.means = layout.blocks_offset;
  b.tail = layout.total_bytes - layout.tail_offset;
  return b;
}

/// Byte offset within a block of tile `tile` (0 .. tiles_per_block() - 1) of head `head`.
PACKKV_HOST_DEVICE constexpr std::int64_t grouped_tile_offset(const grouped_spec& spec, std::int64_t head, int tile) {
  return (head * spec.tiles_per_block() + tile) * spec.tile_bytes();
}

/// Byte offsets within a block of the fp16 numbers of the group that holds an element.
struct group_place {
  std::int64_t first;    ///< maximum (min_max) or scale
  std::int64_t minimum;  ///< only where has_minima()
};
/// `token` counts from the start of the block.
PACKKV_HOST_DEVICE constexpr group_place locate_group(const grouped_spec& spec, std::int64_t heads, std::int64_t head,
                                                      int token, int channel) {
  std::int64_t start = 0, index = 0, count = 0;
  if (spec.shared_numbers()) {
    start = heads * spec.tiles_per_block() * spec.tile_bytes();
    count = spec.shared_groups(heads);
    index = spec.axis == group_axis::token ? row_slot(token) : head * spec.head_dim + channel;
  } else {
    start = grouped_tile_offset(spec, head, token / tile_tokens) + spec.code_bytes();
    count = spec.tile_groups();
    index = spec.axis == group_axis::channel ? token % tile_tokens / spec.group * spec.head_dim + channel
                                             : channel / spec.group * tile_tokens + row_slot(token);
  }
  return {start + 2 * index, start + 2 * (count + index)};
}

}  // namespace packkv

// SPDX-License-Identifier: Apache-2.0
// CPU definition of the `strip-adaptive` format: one side of a sequence to bytes of variable size and back.
//   adaptive_layout l;   make_adaptive_layout(spec, heads, tokens, recent, l);   buffer of l.max_bytes, offsets of
//   l.tiles + 1 encode_adaptive(spec, x, recent, bytes, l.max_bytes, offsets, report);   size: offsets[l.tiles]
#pragma once

#include <cstdint>
#include <cstring>
#include <packkv/codec/adaptive_quantize.hpp>
#include <packkv/reference/grouped_side.hpp>
#include <vector>

namespace packkv::reference {

namespace detail {

/// One block of all heads as codes [heads, 64, head_dim]; the numbers of a group stand at its first element.
struct adaptive_block {
  std::vector<std::uint8_t> codes;
  std::vector<packkv::detail::group_numbers> numbers;
};

/// Codes a block. y is [heads, 64, head_dim] after centring and transform.
inline void quantise_block(const adaptive_spec& spec, std::int64_t heads, const float* y, adaptive_block& block,
                           device_report& report, const finite_rows& finite) {
  using namespace packkv::detail;
  const grouped_spec& groups = spec.groups;
  for_each_group(groups, heads, [&](const group_box& box) {
    const box_range range = range_of(groups, y, box);
    const group_numbers n = range.finite ? min_max_numbers(range.lowest, range.highest) : group_numbers{};
    const group_values v = values_of(spec, n);
    report.flags |= report_of(spec, n, finite.all(box), range.highest);
    const auto at = [&](std::int64_t h, int t, int c) {
      return static_cast<std::size_t>((h * tile_tokens + t) * groups.head_dim + c);
    };
    block.numbers[at(box.head, box.token, box.channel)] = n;
    for (std::int64_t h = box.head; h < box.head + box.heads; ++h)
      for (int t = box.token; t < box.token + box.tokens; ++t)
        for (int c = box.channel; c < box.channel + box.channels; ++c)
          block.codes[at(h, t, c)] = static_cast<std::uint8_t>(encode_in(spec, v, y[at(h, t, c)]));
  });
}

/// Writes maxima and minima of groups of one head, or of those that the heads share.
inline void store_numbers(const adaptive_spec& spec, const packkv::detail::group_numbers* numbers, std::uint8_t* to) {
  for_each_group(spec.groups, 1, [&](const group_box& box) {
    const packkv::detail::group_numbers n = numbers[box.token * spec.groups.head_dim + box.channel];
    const int index = packkv::detail::group_index(spec, box.token, box.channel);
    store_bits(to, 2 * index, n.first);
    store_bits(to, 2 * (spec.number_count() + index), n.minimum);
  });
}

/// Writes one tile from codes [64, head_dim] and numbers; returns its size.
inline std::int64_t store_tile(const adaptive_spec& spec, const std::uint8_t* codes,
                               const packkv::detail::group_numbers* numbers, std::uint8_t* tile) {
  using namespace packkv::detail;
  const int dim = spec.groups.head_dim, strips = spec.strip_count(), wide = dim / strips;
  std::memset(tile, 0, static_cast<std::size_t>(spec.header_bytes()));
  for (int i = 0; i < strips; ++i) {
    int low = max_adaptive_code, high = 0;
    for (int t = 0; t < tile_tokens; ++t)
      for (int c = i * wide; c < (i + 1) * wide; ++c) {
        low = min_of<int>(low, codes[t * dim + c]);
        high = max_of<int>(high, codes[t * dim + c]);
      }
    tile[i] = static_cast<std::uint8_t>(stored_width(high - low));
    tile[strips + i] = static_cast<std::uint8_t>(low);
  }
  const strip_layout layout = strips_of(spec, tile);
  std::uint32_t* const words = reinterpret_cast<std::uint32_t*>(tile + spec.header_bytes());
  std::memset(words, 0, static_cast<std::size_t>(layout.words) * 4);
  for (int t = 0; t < tile_tokens; ++t)
    for (int c = 0; c < dim; ++c) {
      const std::uint32_t code = static_cast<std::uint32_t>(codes[t * dim + c] - tile[strips + c / wide]);
      const code_writes writes = split_code(locate(layout, t, c), code);
      for (int i = 0; i < writes.count; ++i) words[writes.write[i].word] |= writes.write[i].bits;
    }
  const std::int64_t behind = spec.header_bytes() + layout.words * 4;
  if (spec.number_bytes() > 0) store_numbers(spec, numbers, tile + behind);
  return behind + spec.number_bytes();
}

/// Checks all offsets and headers: afterwards every tile lies within the bytes and has the size that its header says.
inline status check_adaptive_tiles(const adaptive_spec& spec, const adaptive_layout& l, const std::uint8_t* bytes,
                                   std::int64_t size, const std::int64_t* offsets) {
  if (offsets[0] != l.tiles_offset || offsets[l.tiles] != size)
    return refuse(status_code::corrupt, "the offsets disagree with the buffer");
  for (std::int64_t i = 0; i < l.tiles; ++i) {  // offsets[i] is where the last tile ends, a multiple of 16
    const std::int64_t left = size - offsets[i];
    if (left < spec.header_bytes() + spec.number_bytes())
      return refuse(status_code::corrupt, "a tile's offset lies outside the buffer", i);
    for (int s = 0; s < spec.strip_count(); ++s)
      if (!is_plan_width(bytes[offsets[i] + s])) return refuse(status_code::corrupt, "a tile's header has no width", i);
    const std::int64_t used =
        spec.header_bytes() + packkv::detail::strips_of(spec, bytes + offsets[i]).words * 4 + spec.number_bytes();
    if (left < used || offsets[i + 1] != offsets[i] + used)
      return refuse(status_code::corrupt, "a tile's size disagrees with its header", i);
  }
  return {};
}

/// Reads one head of a coded side. It remembers the tile that it read last.
class adaptive_reader : public head_reader {
 public:
  adaptive_reader(const adaptive_view& view, const adaptive_layout& layout, std::int64_t head)
      : head_reader(view.spec.groups, view.bytes, layout.tail_offset, layout.tokens, layout.coded_tokens,
                    view.tail_type, head),
        view_(view),
        layout_(layout),
        head_(head) {}

  std::uint32_t code(std::int64_t token, int channel) const {
    enter(token / tile_tokens);
    const std::uint32_t base = tile_[view_.spec.strip_count() + channel / strips_.channels];
    return base + read_code(words_, locate(strips_, static_cast<int>(token % tile_tokens), channel));
  }
  packkv::detail::group_values group(std::int64_t token, int channel) const {
    enter(token / tile_tokens);
    const int index = packkv::detail::group_index(view_.spec, static_cast<int>(token % tile_tokens), channel);
    return packkv::detail::values_of(
        view_.spec, {load_bits(numbers_, 2 * index), load_bits(numbers_, 2 * (view_.spec.number_count() + index))});
  }

 private:
  void enter(std::int64_t block) const {
    if (block == block_) return;
    block_ = block;
    tile_ = view_.bytes + view_.offsets[block * layout_.heads + head_];
    strips_ = packkv::detail::strips_of(view_.spec, tile_);
    words_ = reinterpret_cast<const std::uint32_t*>(tile_ + view_.spec.header_bytes());
    numbers_ = spec().shared_numbers()
                   ? view_.bytes + layout_.shared_offset + block * spec().shared_bytes(layout_.heads)
                   : tile_ + view_.spec.header_bytes() + strips_.words * 4;
  }

  const adaptive_view& view_;
  const adaptive_layout& layout_;
  std::int64_t head_;
  mutable std::int64_t block_ = -1;
  mutable const std::uint8_t *tile_ = nullptr, *numbers_ = nullptr;
  mutable const std::uint32_t* words_ = nullptr;
  mutable strip_layout strips_ = {};
};

/// A checked side, which readers refer to.
struct adaptive_side {
  adaptive_view view;
  adaptive_layout layout;

  const grouped_spec& groups() const { return view.spec.groups; }
  adaptive_reader read(std::int64_t head) const { return {view, layout, head}; }
};

/// Checks everything about a coded side that can be checked, every offset and header among it.
inline status open_side(const adaptive_view& view, adaptive_side& side) {
  side.view = view;
  if (const status s = packkv::detail::check_adaptive_view(view, side.layout); !s) return s;
  return check_adaptive_tiles(view.spec, side.layout, view.bytes, view.size, view.offsets);
}

}  // namespace detail

/// Codes one side of a sequence. x [heads, tokens, head_dim], float16 or bfloat16. `bytes`: 16-byte aligned, `capacity`
/// >= adaptive_layout::max_bytes. `offsets` [tiles + 1]: tile i lies at bytes offsets[i] .. offsets[i + 1]; the last is
/// the number of bytes used. Groups with a non-finite element, or whose bounds leave fp16's range, become NaN and are
/// reported; so are codes above 255 (with an integer zero point), which become 255.
inline status encode_adaptive(const adaptive_spec& spec, const input_view<3>& x, std::int64_t recent,
                              std::uint8_t* bytes, std::int64_t capacity, std::int64_t* offsets,
                              device_report& report) {
  using namespace packkv::detail;
  if (const status s = check_adaptive(spec); !s) return s;
  if (const status s = check_view(x); !s) return s;
  const grouped_spec& groups = spec.groups;
  if (x.type == dtype::float32) return refuse(status_code::unsupported, "strip-adaptive formats code 16-bit tensors");
  if (x.extent[2] != groups.head_dim)
    return refuse(status_code::shape_mismatch, "the tensor's last extent is not the spec's head_dim", x.extent[2]);
  adaptive_layout l;
  if (const status s = make_adaptive_layout(spec, x.extent[0], x.extent[1], recent, l); !s) return s;
  if (capacity < l.max_bytes)
    return refuse(status_code::workspace_too_small, "the buffer is smaller than adaptive_layout::max_bytes",
                  l.max_bytes);
  if (const status s = check_adaptive_buffer(bytes, l.max_bytes, offsets); !s) return s;

  detail::store_means_and_tail(groups, x, l.coded_tokens, bytes, l.tail_offset);
  const std::size_t tile_elements = static_cast<std::size_t>(tile_tokens * groups.head_dim);
  std::vector<float> y(static_cast<std::size_t>(l.heads) * tile_elements);
  detail::adaptive_block block{std::vector<std::uint8_t>(y.size()), std::vector<group_numbers>(y.size())};
  detail::finite_rows finite(groups, l.heads);
  std::int64_t next = l.tiles_offset;
  for (std::int64_t b = 0; b < l.blocks; ++b) {
    detail::load_block(groups, x, bytes, b, y.data(), finite, report);
    detail::quantise_block(spec, l.heads, y.data(), block, report, finite);
    if (groups.shared_numbers()) {
      std::uint8_t* const shared = bytes + l.shared_offset + b * groups.shared_bytes(l.heads);
      std::memset(shared, 0, static_cast<std::size_t>(groups.shared_bytes(l.heads)));
      detail::store_numbers(spec, block.numbers.data(), shared);
    }
    for (std::int64_t h = 0; h < l.heads; ++h) {
      const std::size_t first = static_cast<std::size_t>(h) * tile_elements;
      offsets[b * l.heads + h] = next;
      next += detail::store_tile(spec, block.codes.data() + first, block.numbers.data() + first, bytes + next);
    }
  }
  offsets[l.tiles] = next;
  return {};
}

/// Reconstructs one side into x [heads, tokens, head_dim] of any element type. `size` is the number of bytes that may
/// be read. Offsets and headers are checked completely before anything is written.
inline status decode_adaptive(const adaptive_spec& spec, const std::uint8_t* bytes, std::int64_t size,
                              const std::int64_t* offsets, std::int64_t recent, const output_view<3>& x,
                              dtype tail_type = dtype::float16) {
  using namespace packkv::detail;
  if (const status s = check_adaptive(spec); !s) return s;
  if (const status s = check_view(x); !s) return s;
  if (x.extent[2] != spec.groups.head_dim)
    return refuse(status_code::shape_mismatch, "the tensor's last extent is not the spec's head_dim", x.extent[2]);
  detail::adaptive_side side;
  if (const status s =
          detail::open_side({spec, bytes, size, offsets, x.extent[0], x.extent[1], recent, tail_type}, side);
      !s)
    return s;
  for (std::int64_t h = 0; h < x.extent[0]; ++h) detail::decode_head(side.read(h), h, x);
  return {};
}

}  // namespace packkv::reference

// SPDX-License-Identifier: Apache-2.0
// CPU definition of the `strip-adaptive` format: one side of a sequence to bytes of variable size and back.
//   adaptive_layout l;   make_adaptive_layout(spec, heads, tokens, recent, l);   buffer of l.max_bytes, offsets of
//   l.tiles + 1 encode_adaptive(spec, x, recent, bytes, l.max_bytes, offsets, report);   size: offsets[l.tiles]
#pragma once

#include <cstdint>
#include <cstring>
#include <packkv/codec/adaptive_quantize.hpp>
#include <packkv/reference/grouped.hpp>
#include <vector>

namespace packkv::reference {

/// Codes one side of a sequence. x [heads, tokens, head_dim], float16 or bfloat16. `bytes`: 16-byte aligned, `capacity`
/// >= adaptive_layout::max_bytes. `offsets` [tiles + 1]: tile i lies at bytes offsets[i] .. offsets[i + 1]; the last is
/// the number of bytes used. Non-finite groups become NaN and are reported.
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
  if (offsets == nullptr || (bytes == nullptr && l.max_bytes > 0))
    return refuse(status_code::invalid_argument, "the buffer or the offsets are null");
  if (reinterpret_cast<std::uintptr_t>(bytes) % 16 != 0)
    return refuse(status_code::misaligned, "the buffer must be 16-byte aligned");

  const int dim = groups.head_dim;
  if (groups.centred)
    for (std::int64_t h = 0; h < l.heads; ++h)
      for (int c = 0; c < dim; ++c)
        detail::store_bits(bytes, 2 * (h * dim + c), detail::channel_mean_bits(x, h, c, l.coded_tokens));
  std::uint8_t* tail = bytes + l.tail_offset;
  for (std::int64_t h = 0; h < l.heads; ++h)
    for (std::int64_t t = l.coded_tokens; t < l.tokens; ++t)
      for (int c = 0; c < dim; ++c, tail += 2) std::memcpy(tail, address(x, h, t, c), 2);

  const std::size_t tile_elements = static_cast<std::size_t>(tile_tokens * dim);
  std::vector<float> y(static_cast<std::size_t>(l.heads) * tile_elements);
  std::vector<std::uint8_t> codes(y.size());
  std::vector<group_numbers> numbers(y.size());  // of the first element of each group
  float row[max_head_dim];
  std::int64_t next = l.tiles_offset;
  for (std::int64_t b = 0; b < l.blocks; ++b) {
    bool finite = true;
    for (std::int64_t h = 0; h < l.heads; ++h)
      for (int t = 0; t < tile_tokens; ++t) {
        detail::load_token(address(x, h, b * tile_tokens + t, 0), x.stride[2], x.type, dim, row);
        for (int c = 0; c < dim; ++c) {
          finite = finite && is_finite(row[c]);
          if (groups.centred) row[c] = sub_rn(row[c], half_to_float(detail::load_bits(bytes, 2 * (h * dim + c))));
        }
        transform_forward(groups.transform, nullptr, dim, row, y.data() + (h * tile_tokens + t) * dim);
      }
    if (!finite) report.flags |= report_nonfinite_input;

    const auto at = [&](std::int64_t h, int t, int c) {
      return static_cast<std::size_t>((h * tile_tokens + t) * dim + c);
    };
    detail::for_each_group(groups, l.heads, [&](const detail::group_box& box) {
      float lowest = infinity(), highest = -infinity();
      bool valid = true;
      detail::box_sum(groups, y.data(), box, [&](double, float e) {
        valid = valid && is_finite(e);
        lowest = min_of(lowest, e);
        highest = max_of(highest, e);
        return 0.0;
      });
      const group_numbers n = valid ? min_max_numbers(lowest, highest) : group_numbers{};
      const group_values v = values_of(spec, n);
      if (!n.valid() && finite) report.flags |= report_scale_overflow;
      numbers[at(box.head, box.token, box.channel)] = n;
      for (std::int64_t h = box.head; h < box.head + box.heads; ++h)
        for (int t = box.token; t < box.token + box.tokens; ++t)
          for (int c = box.channel; c < box.channel + box.channels; ++c)
            codes[at(h, t, c)] = static_cast<std::uint8_t>(encode_in(spec, v, y[at(h, t, c)]));
      const bool shared = groups.axis == group_axis::token;
      if (!shared) return;
      std::uint8_t* to = bytes + l.shared_offset + b * groups.shared_bytes(l.heads);
      const int index = group_index(spec, box.token, box.channel);
      detail::store_bits(to, 2 * index, n.first);
      detail::store_bits(to, 2 * (tile_tokens + index), n.minimum);
    });

    for (std::int64_t h = 0; h < l.heads; ++h) {
      std::uint8_t* const tile = bytes + next;
      std::memset(tile, 0, static_cast<std::size_t>(spec.header_bytes()));
      const int strips = spec.strip_count(), wide = dim / strips;
      for (int i = 0; i < strips; ++i) {
        int low = 255, high = 0;
        for (int t = 0; t < tile_tokens; ++t)
          for (int c = i * wide; c < (i + 1) * wide; ++c) {
            low = min_of<int>(low, codes[at(h, t, c)]);
            high = max_of<int>(high, codes[at(h, t, c)]);
          }
        tile[i] = static_cast<std::uint8_t>(stored_width(high - low));
        tile[strips + i] = static_cast<std::uint8_t>(low);
      }
      const strip_layout layout = strips_of(spec, tile);
      std::uint32_t* const words = reinterpret_cast<std::uint32_t*>(tile + spec.header_bytes());
      std::memset(words, 0, static_cast<std::size_t>(layout.words) * 4);
      for (int t = 0; t < tile_tokens; ++t)
        for (int c = 0; c < dim; ++c) {
          const std::uint32_t code = static_cast<std::uint32_t>(codes[at(h, t, c)] - tile[strips + c / wide]);
          const code_writes writes = split_code(locate(layout, t, c), code);
          for (int i = 0; i < writes.count; ++i) words[writes.write[i].word] |= writes.write[i].bits;
        }
      std::uint8_t* const own = tile + spec.header_bytes() + layout.words * 4;
      if (spec.number_bytes() > 0)
        detail::for_each_group(groups, 1, [&](const detail::group_box& box) {
          const group_numbers n = numbers[at(h, box.token, box.channel)];
          const int index = group_index(spec, box.token, box.channel);
          detail::store_bits(own, 2 * index, n.first);
          detail::store_bits(own, 2 * (groups.tile_groups() + index), n.minimum);
        });
      offsets[b * l.heads + h] = next;
      next += spec.header_bytes() + layout.words * 4 + spec.number_bytes();
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
  const grouped_spec& groups = spec.groups;
  if (tail_type == dtype::float32) return refuse(status_code::invalid_argument, "the tail holds 16-bit elements");
  if (x.extent[2] != groups.head_dim)
    return refuse(status_code::shape_mismatch, "the tensor's last extent is not the spec's head_dim", x.extent[2]);
  adaptive_layout l;
  if (const status s = make_adaptive_layout(spec, x.extent[0], x.extent[1], recent, l); !s) return s;
  if (offsets == nullptr || (bytes == nullptr && size > 0))
    return refuse(status_code::invalid_argument, "the buffer or the offsets are null");
  if (reinterpret_cast<std::uintptr_t>(bytes) % 16 != 0)
    return refuse(status_code::misaligned, "the buffer must be 16-byte aligned");
  if (offsets[0] != l.tiles_offset || offsets[l.tiles] != size)
    return refuse(status_code::corrupt, "the offsets disagree with the buffer");
  for (std::int64_t i = 0; i < l.tiles; ++i) {
    const bool inside = offsets[i] >= l.tiles_offset && offsets[i] <= size && offsets[i] % 16 == 0;
    const std::int64_t left = inside ? size - offsets[i] : -1;
    if (left < spec.header_bytes() + spec.number_bytes())
      return refuse(status_code::corrupt, "a tile's offset lies outside the buffer", i);
    for (int s = 0; s < spec.strip_count(); ++s)
      if (!is_plan_width(bytes[offsets[i] + s])) return refuse(status_code::corrupt, "a tile's header has no width", i);
    const std::int64_t used = spec.header_bytes() + strips_of(spec, bytes + offsets[i]).words * 4 + spec.number_bytes();
    if (left < used || offsets[i + 1] != offsets[i] + used)
      return refuse(status_code::corrupt, "a tile's size disagrees with its header", i);
  }

  const int dim = groups.head_dim, strips = spec.strip_count();
  float y[max_head_dim], row[max_head_dim];
  for (std::int64_t h = 0; h < l.heads; ++h)
    for (std::int64_t t = 0; t < l.tokens; ++t) {
      if (t < l.coded_tokens) {
        const std::int64_t b = t / tile_tokens;
        const int slot = static_cast<int>(t % tile_tokens);
        const std::uint8_t* const tile = bytes + offsets[b * l.heads + h];
        const strip_layout layout = strips_of(spec, tile);
        const std::uint32_t* const words = reinterpret_cast<const std::uint32_t*>(tile + spec.header_bytes());
        const bool shared = groups.axis == group_axis::token;
        const std::uint8_t* const numbers = shared ? bytes + l.shared_offset + b * groups.shared_bytes(l.heads)
                                                   : tile + spec.header_bytes() + layout.words * 4;
        const std::int64_t count = shared ? tile_tokens : groups.tile_groups();
        for (int c = 0; c < dim; ++c) {
          const int index = group_index(spec, slot, c);
          const group_values v =
              values_of(spec, {detail::load_bits(numbers, 2 * index), detail::load_bits(numbers, 2 * (count + index))});
          y[c] = decode_in(spec, v, tile[strips + c / layout.channels] + read_code(words, locate(layout, slot, c)));
        }
        transform_inverse(groups.transform, nullptr, dim, y, row);
        for (int c = 0; c < dim && groups.centred; ++c)
          row[c] = add_rn(row[c], half_to_float(detail::load_bits(bytes, 2 * (h * dim + c))));
      } else {
        const std::int64_t at = h * (l.tokens - l.coded_tokens) + t - l.coded_tokens;
        detail::load_token(bytes + l.tail_offset + at * dim * 2, 2, tail_type, dim, row);
      }
      detail::store_token(address(x, h, t, 0), x.stride[2], x.type, dim, row);
    }
  return {};
}

}  // namespace packkv::reference

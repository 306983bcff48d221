// SPDX-License-Identifier: Apache-2.0
// One tile of packs as bytes (docs/format-packkv.md, section 4): codes in, bytes out, and back.
//   packkv::reference::encode_pack_tile(16, 128, codes, stride, order, bytes, statistics);
//   packkv::reference::decode_pack_tile(16, 128, tile, codes);
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <packkv/codec/pack_format.hpp>
#include <vector>

namespace packkv::reference {

namespace detail {

/// Appends fields of bits to zeroed bytes, lowest bit first.
class bit_writer {
 public:
  explicit bit_writer(std::uint8_t* at) : at_(at) {}
  /// `value` has at most `bits` <= 64 bits.
  void put(std::uint64_t value, int bits) {
    if (bits == 0) return;
    held_ |= value << count_;
    const int total = count_ + bits;
    if (total >= 64) {
      store(8);
      held_ = count_ == 0 ? 0 : value >> (64 - count_);
      count_ = total - 64;
    } else {
      count_ = total;
    }
  }
  /// Writes what is held, up to a whole 32-bit word.
  void align_word() {
    if (count_ > 0) store(count_ > 32 ? 8 : 4);
    held_ = 0;
    count_ = 0;
  }

 private:
  void store(int bytes) {
    for (int i = 0; i < bytes; ++i) at_[i] = static_cast<std::uint8_t>(held_ >> (8 * i));
    at_ += bytes;
  }

  std::uint8_t* at_;
  std::uint64_t held_ = 0;
  int count_ = 0;  ///< bits held, 0..63
};

/// The field of `bits` <= 8 bits that begins `position` bits behind `p`; touches no byte beyond the field.
inline std::uint32_t read_bits(const std::uint8_t* p, std::int64_t position, int bits) {
  if (bits == 0) return 0;
  p += position / 8;
  const int shift = static_cast<int>(position % 8);
  std::uint32_t window = p[0];
  if (shift + bits > 8) window |= static_cast<std::uint32_t>(p[1]) << 8;
  return (window >> shift) & ((1u << bits) - 1u);
}

inline constexpr int max_packs = max_head_dim * (tile_tokens / 2);

/// Smallest code and width of every pack of a tile, pack (group, channel) at group * head_dim + channel.
struct tile_packs {
  std::uint8_t minimum[max_packs];
  std::uint8_t width[max_packs];
};

/// rows: the tile's codes by channel, [head_dim][64].
inline void measure_packs(int pack_size, int head_dim, const std::uint8_t* rows, tile_packs& packs) {
  for (int c = 0; c < head_dim; ++c)
    for (int g = 0; g < tile_tokens / pack_size; ++g) {
      const std::uint8_t* const x = rows + c * tile_tokens + g * pack_size;
      std::uint8_t low = x[0], high = x[0];
      for (int i = 1; i < pack_size; ++i) {
        low = min_of(low, x[i]);
        high = max_of(high, x[i]);
      }
      packs.minimum[g * head_dim + c] = low;
      packs.width[g * head_dim + c] = static_cast<std::uint8_t>(bit_length(static_cast<std::uint32_t>(high - low)));
    }
}

/// The header of a stored tile; the caller has checked that its bytes exist.
inline pack_tile stored_shape(const std::uint8_t* tile, int pack_size, int head_dim) {
  return {pack_size, head_dim, tile[0], tile[1]};
}

}  // namespace detail

/// Appends a tile to `out`, which begins at a multiple of 16 bytes. codes: byte (token, channel) at
/// codes[token * stride + channel]; order[slot] is the token that is stored as `slot`. Adds to packs, values,
/// payload_bits and tile_bytes of `statistics`.
inline void encode_pack_tile(int pack_size, int head_dim, const std::uint8_t* codes, std::int64_t stride,
                             const std::uint8_t* order, std::vector<std::uint8_t>& out, pack_statistics& statistics) {
  std::uint8_t rows[max_head_dim * tile_tokens];  // by channel, tokens in their new order
  for (int slot = 0; slot < tile_tokens; ++slot) {
    const std::uint8_t* const from = codes + order[slot] * stride;
    for (int c = 0; c < head_dim; ++c) rows[c * tile_tokens + slot] = from[c];
  }
  detail::tile_packs packs;
  detail::measure_packs(pack_size, head_dim, rows, packs);
  pack_tile shape{pack_size, head_dim, 0, 0};
  int start[tile_tokens] = {}, words = 0;
  for (int g = 0; g < shape.groups(); ++g) {
    int widths = 0;
    for (int c = 0; c < head_dim; ++c) {
      const int pack = g * head_dim + c;
      widths += packs.width[pack];
      shape.min_bits = max_of(shape.min_bits, bit_length(packs.minimum[pack]));
      shape.width_bits = max_of(shape.width_bits, bit_length(packs.width[pack]));
    }
    start[g] = words;
    words += shape.group_words(widths);
    statistics.payload_bits += std::int64_t{widths} * pack_size;
  }
  statistics.packs += shape.packs();
  statistics.values += std::int64_t{tile_tokens} * head_dim;
  statistics.tile_bytes += shape.tile_bytes(words);

  const std::size_t at = out.size();
  out.resize(at + static_cast<std::size_t>(shape.tile_bytes(words)), 0);
  std::uint8_t* const tile = out.data() + at;
  tile[0] = static_cast<std::uint8_t>(shape.min_bits);
  tile[1] = static_cast<std::uint8_t>(shape.width_bits);
  detail::bit_writer starts(tile + pack_tile::starts_offset), widths(tile + shape.widths_offset()),
      minima(tile + shape.minima_offset()), payload(tile + shape.payload_offset());
  for (int g = 0; g < shape.groups(); ++g) {
    starts.put(static_cast<std::uint64_t>(start[g]), 16);
    for (int c = 0; c < head_dim; ++c) {
      const int width = packs.width[g * head_dim + c], minimum = packs.minimum[g * head_dim + c];
      widths.put(static_cast<std::uint64_t>(width), shape.width_bits);
      minima.put(static_cast<std::uint64_t>(minimum), shape.min_bits);
      if (width == 0) continue;
      const std::uint8_t* const x = rows + c * tile_tokens + g * pack_size;
      for (int first = 0; first < pack_size; first += 8) {  // 8 fields have at most 64 bits
        const int count = min_of(pack_size, 8);
        std::uint64_t fields = 0;
        for (int i = 0; i < count; ++i) fields |= static_cast<std::uint64_t>(x[first + i] - minimum) << (i * width);
        payload.put(fields, count * width);
      }
    }
    payload.align_word();
  }
  starts.align_word();
  widths.align_word();
  minima.align_word();
}

namespace detail {

/// f(slot, channel, code) for every code of a tile whose fields are where they must be; damaged codes may exceed 255.
template <class F>
void for_each_code(const pack_tile& shape, const std::uint8_t* tile, F&& f) {
  const std::uint8_t* const payload = tile + shape.payload_offset();
  for (int g = 0; g < shape.groups(); ++g) {
    const std::uint8_t* const start = tile + pack_tile::starts_offset + 2 * g;
    std::int64_t position = 32 * std::int64_t{start[0] | start[1] << 8};
    for (int c = 0; c < shape.head_dim; ++c) {
      const std::int64_t pack = std::int64_t{g} * shape.head_dim + c;
      const int width = static_cast<int>(read_bits(tile + shape.widths_offset(), pack * shape.width_bits, shape.width_bits));
      const std::uint32_t minimum = read_bits(tile + shape.minima_offset(), pack * shape.min_bits, shape.min_bits);
      for (int i = 0; i < shape.pack_size; ++i, position += width)
        f(g * shape.pack_size + i, c, minimum + read_bits(payload, position, width));
    }
  }
}

}  // namespace detail

/// Checks everything in a tile of `bytes` bytes: field sizes, widths, where groups begin, the size, and that no code is
/// beyond 255.
inline status check_pack_tile(int pack_size, int head_dim, const std::uint8_t* tile, std::int64_t bytes) {
  if (bytes < pack_tile::starts_offset) return refuse(status_code::corrupt, "a tile is shorter than its header");
  const pack_tile shape = detail::stored_shape(tile, pack_size, head_dim);
  if (shape.min_bits > 8 || shape.width_bits > 4 || tile[2] != 0 || tile[3] != 0)
    return refuse(status_code::corrupt, "a tile's header is damaged");
  if (bytes < shape.payload_offset()) return refuse(status_code::corrupt, "a tile is shorter than its packs");
  int words = 0;
  for (int g = 0; g < shape.groups(); ++g) {
    const std::uint8_t* const start = tile + pack_tile::starts_offset + 2 * g;
    if ((start[0] | start[1] << 8) != words)
      return refuse(status_code::corrupt, "a tile's groups are not where they must be");
    int widths = 0;
    for (int c = 0; c < head_dim; ++c) {
      const std::int64_t pack = std::int64_t{g} * head_dim + c;
      const int width =
          static_cast<int>(detail::read_bits(tile + shape.widths_offset(), pack * shape.width_bits, shape.width_bits));
      if (width > 8) return refuse(status_code::corrupt, "a pack is wider than 8 bits");
      widths += width;
    }
    words += shape.group_words(widths);
  }
  if (bytes != shape.tile_bytes(words)) return refuse(status_code::corrupt, "a tile's size does not fit its packs");
  bool overflow = false;
  detail::for_each_code(shape, tile, [&](int, int, std::uint32_t code) { overflow = overflow || code > 255; });
  if (overflow) return refuse(status_code::corrupt, "a pack has codes beyond 255");
  return {};
}

/// Codes of a checked tile: codes[slot * head_dim + channel], uint8 [64][head_dim].
inline void decode_pack_tile(int pack_size, int head_dim, const std::uint8_t* tile, std::uint8_t* codes) {
  detail::for_each_code(detail::stored_shape(tile, pack_size, head_dim), tile, [&](int slot, int c, std::uint32_t code) {
    codes[slot * head_dim + c] = static_cast<std::uint8_t>(code);
  });
}

}  // namespace packkv::reference

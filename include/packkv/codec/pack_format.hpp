// SPDX-License-Identifier: Apache-2.0
// PackKV's format: quantised 64-token blocks whose tokens may be reordered, stored as packs of a minimum and a width.
// One idea: a group stores its smallest and largest element as they came; step and zero point follow from them, so the
// published arithmetic is exact and costs 32 bits a group. docs/format-packkv.md has every byte.
//   pack_format f;   f.order = token_order::greedy;   f.pack_size = 16;   f.key.relative_step = 0.1f;
#pragma once

#include <cstdint>
#include <initializer_list>
#include <packkv/codec/strips.hpp>
#include <packkv/core/checked.hpp>
#include <packkv/core/config.hpp>
#include <packkv/core/status.hpp>
#include <packkv/core/views.hpp>

namespace packkv {

/// Which elements of one batch row share a step.
enum class pack_granularity : std::uint8_t {
  token,    ///< all KV heads and channels of one token
  vector,   ///< the channels of one head of one token
  channel,  ///< the 64 tokens of one channel of one head
  block,    ///< all heads, tokens and channels of a block
};

/// x^ = (code + zero) * step with an integer zero, or x^ = code * step + smallest element.
enum class pack_zero : std::uint8_t { integer, floating };

/// Order of the 64 tokens of a block; one for K and V, all heads and batch rows.
enum class token_order : std::uint8_t { none, median, greedy };

/// One side of the format.
struct pack_codec {
  pack_granularity granularity = pack_granularity::token;
  pack_zero zero = pack_zero::integer;
  std::int16_t head_dim = 128;
  float relative_step = 0.1f;  ///< step / (largest - smallest element of a group); 0 < r <= 1
};

/// Both sides. The order and the pack size are common, because K and V share the order of tokens.
struct pack_format {
  pack_codec key, value;
  token_order order = token_order::greedy;
  int pack_size = 16;              ///< tokens of a pack: 2, 4, 8, 16 or 32
  dtype element = dtype::float16;  ///< type of the coded tensors and of the stored ranges: float16 or bfloat16
  std::int32_t kv_heads = 1;
  std::int32_t batch = 1;

  PACKKV_HOST_DEVICE constexpr const pack_codec& codec(side which) const { return which == side::key ? key : value; }
};

/// Blocks of a buffer of `tokens` tokens that are coded; the newest 128..191 tokens stay 16-bit (PackKV's recent size
/// 192 and block 64: floor((L + 64 - L mod 64 - 192) / 64), if positive).
PACKKV_HOST_DEVICE constexpr std::int64_t coded_blocks(std::int64_t tokens) {
  const std::int64_t blocks = (tokens + 64 - tokens % 64 - 192) / 64;
  return tokens < 192 ? 0 : blocks;
}

/// Bits of the smallest field that holds `x`: ceil(log2(x + 1)).
PACKKV_HOST_DEVICE constexpr int bit_length(std::uint32_t x) {
  int bits = 0;
  for (; x != 0; x >>= 1) ++bits;
  return bits;
}

/// Checks what does not depend on data.
inline status check_format(const pack_format& f) {
  for (const pack_codec& c : {f.key, f.value}) {
    if (!is_head_dim(c.head_dim))
      return refuse(status_code::unsupported, "head_dim must be 64, 96, 128, 192, 256 or 512", c.head_dim);
    if (static_cast<int>(c.granularity) > 3 || static_cast<int>(c.zero) > 1)
      return refuse(status_code::invalid_argument, "unknown granularity or zero point");
    if (!(c.relative_step > 0.0f && c.relative_step <= 1.0f))
      return refuse(status_code::invalid_argument, "a relative step must be > 0 and at most 1");
  }
  if (static_cast<int>(f.order) > 2) return refuse(status_code::invalid_argument, "unknown token order");
  if (f.pack_size < 2 || f.pack_size > 32 || (f.pack_size & (f.pack_size - 1)) != 0)
    return refuse(status_code::invalid_argument, "a pack has 2, 4, 8, 16 or 32 tokens", f.pack_size);
  if (f.element != dtype::float16 && f.element != dtype::bfloat16)
    return refuse(status_code::unsupported, "packs are made of float16 or bfloat16 elements");
  if (f.kv_heads <= 0 || f.batch <= 0)
    return refuse(status_code::invalid_argument, "a pack format needs at least one KV head and one batch row");
  // The greedy order compares cosines exactly in 128 bits: 255^2 * channels < 2^42.
  const checked channels = checked(f.batch) * f.kv_heads * (f.key.head_dim + f.value.head_dim);
  if (!channels.valid() || channels.value() > (std::int64_t{1} << 26))
    return refuse(status_code::overflow, "a block has more than 2^26 channels (heads x batch x head dims)");
  return {};
}

/// Groups of elements with one step in one batch row of one block: the entries of `pack_side::ranges` per batch row and
/// block, in this order: token [slot], vector [head][slot], channel [head][channel], block [1].
PACKKV_HOST_DEVICE constexpr std::int64_t range_count(const pack_format& f, side which) {
  const pack_codec& c = f.codec(which);
  switch (c.granularity) {
    case pack_granularity::token:
      return tile_tokens;
    case pack_granularity::vector:
      return std::int64_t{f.kv_heads} * tile_tokens;
    case pack_granularity::channel:
      return std::int64_t{f.kv_heads} * c.head_dim;
    default:
      return 1;
  }
}

/// Group of element (head, slot, channel) among those of its batch row and block.
PACKKV_HOST_DEVICE constexpr std::int64_t range_index(const pack_codec& c, int head, int slot, int channel) {
  switch (c.granularity) {
    case pack_granularity::token:
      return slot;
    case pack_granularity::vector:
      return std::int64_t{head} * tile_tokens + slot;
    case pack_granularity::channel:
      return std::int64_t{head} * c.head_dim + channel;
    default:
      return 0;
  }
}

/// Smallest and largest element of a group, as bits of the format's element type.
struct pack_range {
  std::uint16_t low = 0;
  std::uint16_t high = 0;
};
static_assert(sizeof(pack_range) == 4, "a range is two 16-bit elements");

/// Where the parts of a tile begin, in bytes from its start; a tile is a multiple of 16 bytes.
///   [0] bits of a minimum, [1] bits of a width, [2, 3] 0; then starts, widths, minima, payload
///   (docs/format-packkv.md).
struct pack_tile {
  int pack_size = 16;
  int head_dim = 128;
  int min_bits = 0;    ///< 0..8
  int width_bits = 0;  ///< 0..4

  static constexpr int starts_offset = 4;
  PACKKV_HOST_DEVICE constexpr int groups() const { return tile_tokens / pack_size; }  ///< packs of one channel
  PACKKV_HOST_DEVICE constexpr int packs() const { return groups() * head_dim; }
  PACKKV_HOST_DEVICE constexpr int widths_offset() const { return starts_offset + words_of(16 * groups()) * 4; }
  PACKKV_HOST_DEVICE constexpr int minima_offset() const {
    return widths_offset() + words_of(width_bits * packs()) * 4;
  }
  PACKKV_HOST_DEVICE constexpr int payload_offset() const { return minima_offset() + words_of(min_bits * packs()) * 4; }
  /// Bytes of a tile whose groups of packs occupy `payload_words` 32-bit words.
  PACKKV_HOST_DEVICE constexpr int tile_bytes(int payload_words) const {
    return (payload_offset() + payload_words * 4 + 15) / 16 * 16;
  }
  /// Words of the payload of one group if the widths of its packs sum to `widths`.
  PACKKV_HOST_DEVICE constexpr int group_words(int widths) const { return words_of(widths * pack_size); }

  PACKKV_HOST_DEVICE static constexpr int words_of(int bits) { return (bits + 31) / 32; }
};

/// Tiles of one side of `blocks` blocks: tile (block, batch row, head) is number (block * batch + b) * kv_heads + h.
PACKKV_HOST_DEVICE constexpr std::int64_t tile_count(const pack_format& f, std::int64_t blocks) {
  return (checked(blocks) * f.batch * f.kv_heads).value();
}

/// Largest possible bytes of the tiles of one side of `blocks` blocks, whatever the data; 0 if that does not fit 63
/// bits.
PACKKV_HOST_DEVICE constexpr std::int64_t max_pack_bytes(const pack_format& f, side which, std::int64_t blocks) {
  const pack_tile widest{f.pack_size, f.codec(which).head_dim, 8, 4};
  const int payload = widest.groups() * widest.group_words(8 * widest.head_dim);
  return (checked(blocks) * f.batch * f.kv_heads * widest.tile_bytes(payload)).value();
}

/// Packed bytes of one side, to be written. Host memory of the reference, device memory of kernels.
struct pack_side {
  pack_range* ranges = nullptr;  ///< [blocks][batch][range_count()]
  std::int64_t* offsets =
      nullptr;  ///< [tile_count() + 1]: byte where each tile begins; offsets[0] = 0, the last is the end
  std::uint8_t* data = nullptr;  ///< tiles, 16-byte aligned
  std::int64_t capacity = 0;     ///< bytes at `data`
};

/// Packed bytes of one side, to be read; `size` bytes at `data`.
struct const_pack_side {
  const pack_range* ranges = nullptr;
  const std::int64_t* offsets = nullptr;
  const std::uint8_t* data = nullptr;
  std::int64_t size = 0;
};

/// Both sides of `blocks` blocks, to be read.
struct packs_view {
  const_pack_side key, value;
  std::int64_t blocks = 0;
};

/// Every byte that one side of `blocks` blocks stores when its tiles take `tile_bytes`: ranges, offsets and tiles.
PACKKV_HOST_DEVICE constexpr std::int64_t stored_bytes(const pack_format& f, side which, std::int64_t blocks,
                                                       std::int64_t tile_bytes) {
  const checked ranges = checked(blocks) * f.batch * range_count(f, which) * std::int64_t{sizeof(pack_range)};
  return (ranges + checked(tile_count(f, blocks) + 1) * 8 + tile_bytes).value();
}

/// What PackKV's published size formula needs to know about one side.
struct pack_statistics {
  std::int64_t values = 0;
  std::int64_t packs = 0;
  std::int64_t payload_bits = 0;  ///< sum of pack_size * width
  int distinct_codes = 0;         ///< over the whole tensor
  std::int64_t tile_bytes = 0;    ///< bytes of the tiles, everything in them

  /// RAW = ceil(log2(distinct codes)).
  constexpr int raw_bits() const {
    return distinct_codes > 1 ? bit_length(static_cast<std::uint32_t>(distinct_codes - 1)) : 0;
  }
  /// Mean payload width per value.
  constexpr double payload_bits_per_value() const {
    return values > 0 ? static_cast<double>(payload_bits) / static_cast<double>(values) : 0.0;
  }
  /// Payload, minima of RAW bits and widths of ceil(log2(RAW + 1)) bits; no ranges, no padding.
  constexpr std::int64_t published_bits() const {
    return payload_bits + packs * (raw_bits() + bit_length(static_cast<std::uint32_t>(raw_bits())));
  }
  /// 2 bytes per value against the published size, which counts as at least one bit.
  constexpr double published_ratio() const {
    return values > 0
               ? 16.0 * static_cast<double>(values) / static_cast<double>(max_of<std::int64_t>(published_bits(), 1))
               : 1.0;
  }
};

}  // namespace packkv

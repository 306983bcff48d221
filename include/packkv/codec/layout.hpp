// SPDX-License-Identifier: Apache-2.0
// The map between a code's place in the tensor (token, channel) and its place in the tile (word, bit).
// One idea: words lie in the order in which a warp's matrix fragments want them, so decoding masks bits where
// they are; this file is the only definition of that order (docs/format.md, "Code words").
//   code_place p = locate(strips, token, channel);   code = (words[p.low.word] >> p.low.bit) & 3;
#pragma once

#include <cstdint>
#include <packkv/codec/strips.hpp>

namespace packkv {

/// A field of a tile's code words: word index from the start of the tile, lowest bit within the word.
struct bit_field {
  std::int32_t word;
  std::int32_t bit;
};

/// Where a code lies. Width 3 is split: `low` holds bits 0-1, `high` bit 2. Width 0 has no field.
struct code_place {
  int width;
  bit_field low;
  bit_field high;
};

namespace detail {

// A warp holds a tile as fragments: `lane` = 4 * (row % 8) + column group; a lane's words of one plane are
// contiguous in vectors of at most 4, so that every load is one 16-, 8- or 4-byte access.
PACKKV_HOST_DEVICE constexpr std::int32_t fragment_word(std::int32_t base, int words_per_lane, int lane, int index) {
  const int vec = words_per_lane < 4 ? words_per_lane : 4;
  return base + (index / vec) * 32 * vec + lane * vec + index % vec;
}

/// K: rows are tokens, the byte of a word is the channel within a group of four (`m16n8k32` / `m16n8k16`, A operand).
PACKKV_HOST_DEVICE constexpr bit_field key_field(int bits, std::int32_t base, int strip_channels, int token,
                                                 int channel) {
  const int byte = channel & 3;
  const int lane = (token & 7) * 4 + ((channel & 15) >> 2);
  const int row_half = (token >> 3) & 1;  // rows r and r + 8 of a 16-row fragment
  const int row_tile = token >> 4;        // 16-token fragment
  const int slot = row_tile * 2 + row_half;
  if (strip_channels == 32) {
    const int channel_half = (channel >> 4) & 1;  // channels c and c + 16
    switch (bits) {
      case 8:
        return {fragment_word(base, 16, lane, row_tile * 4 + channel_half * 2 + row_half), 8 * byte};
      case 4:
        return {fragment_word(base, 8, lane, slot), 8 * byte + 4 * channel_half};
      case 2:
        return {fragment_word(base, 4, lane, (row_tile >> 1) * 2 + row_half),
                8 * byte + 4 * (row_tile & 1) + 2 * channel_half};
      default:
        return {fragment_word(base, 2, lane, row_half), 8 * byte + 2 * row_tile + channel_half};
    }
  }
  switch (bits) {
    case 8:
      return {fragment_word(base, 8, lane, slot), 8 * byte};
    case 4:
      return {fragment_word(base, 4, lane, (row_tile >> 1) * 2 + row_half), 8 * byte + 4 * (row_tile & 1)};
    case 2:
      return {fragment_word(base, 2, lane, row_half), 8 * byte + 2 * row_tile};
    default:
      return {fragment_word(base, 1, lane, 0), 8 * byte + 2 * row_tile + row_half};
  }
}

/// V: rows are channels, the half of a word is the token's parity (`m16n8k16` fp16, A operand = V transposed).
PACKKV_HOST_DEVICE constexpr bit_field value_field(int bits, std::int32_t base, int token, int channel) {
  const int half = token & 1;
  const int token_half = (token >> 3) & 1;  // tokens t and t + 8
  const int token_tile = token >> 4;        // 16-token fragment
  const int row_half = (channel >> 3) & 1;  // channels c and c + 8
  const int lane = (channel & 7) * 4 + ((token & 7) >> 1);
  const int shift = 16 * half;
  switch (bits) {
    case 8:
      return {fragment_word(base, 8, lane, token_tile * 2 + token_half), shift + 8 * row_half};
    case 4:
      return {fragment_word(base, 4, lane, token_tile), shift + 8 * row_half + 4 * token_half};
    case 2:
      return {fragment_word(base, 2, lane, token_tile >> 1),
              shift + 8 * row_half + 4 * (token_tile & 1) + 2 * token_half};
    default:
      return {fragment_word(base, 1, lane, 0), shift + 8 * row_half + 2 * token_tile + token_half};
  }
}

}  // namespace detail

/// Place of the code of (token 0..63, channel 0..head_dim-1).
PACKKV_HOST_DEVICE constexpr code_place locate(const strip_layout& strips, int token, int channel) {
  const int strip = channel / strips.channels;
  const int width = strips.width[strip];
  const int low_bits = width == 3 ? 2 : width;
  code_place place{width, {0, 0}, {0, 0}};
  if (width == 0) return place;
  const auto field = [&](int bits, std::int32_t base) {
    return strips.which == side::key ? detail::key_field(bits, base, strips.channels, token, channel)
                                     : detail::value_field(bits, base, token, channel);
  };
  place.low = field(low_bits, strips.low[strip]);
  if (width == 3) place.high = field(1, strips.high[strip]);
  return place;
}

/// Slot of a token's row data (scale, leading components): a lane's eight tokens are contiguous.
PACKKV_HOST_DEVICE constexpr int row_slot(int token) { return (token & 7) * 8 + (token >> 3); }

/// The code at `place`; 0 for width 0.
PACKKV_HOST_DEVICE inline std::uint32_t read_code(const std::uint32_t* words, const code_place& place) {
  if (place.width == 0) return 0;
  const int low_bits = place.width == 3 ? 2 : place.width;
  std::uint32_t code = (words[place.low.word] >> place.low.bit) & ((1u << low_bits) - 1);
  if (place.width == 3) code |= ((words[place.high.word] >> place.high.bit) & 1u) << 2;
  return code;
}

/// One word's share of storing a code: `word = (word & ~mask) | bits`.
struct code_write {
  std::int32_t word;
  std::uint32_t mask;
  std::uint32_t bits;
};
/// All words that storing a code changes.
struct code_writes {
  int count;  ///< 0 at width 0, 2 at width 3, else 1
  code_write write[2];
};

/// What storing `code` at `place` changes.
PACKKV_HOST_DEVICE constexpr code_writes split_code(const code_place& place, std::uint32_t code) {
  if (place.width == 0) return {0, {}};
  const std::uint32_t mask = (1u << (place.width == 3 ? 2 : place.width)) - 1;
  const code_write low{place.low.word, mask << place.low.bit, (code & mask) << place.low.bit};
  if (place.width != 3) return {1, {low, {}}};
  return {2, {low, {place.high.word, 1u << place.high.bit, ((code >> 2) & 1u) << place.high.bit}}};
}

}  // namespace packkv

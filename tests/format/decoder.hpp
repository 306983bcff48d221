// SPDX-License-Identifier: Apache-2.0
// A second decoder of packkv pages, written from docs/format.md alone. It includes nothing of packkv and shares no
// table with it, so that an error must be made twice, and alike, before the tests that compare the two go quiet.
//
//     clean::description f;                        // which format, as its owner knows it
//     f.coding = clean::kind::plan, f.of = clean::side::key, f.head_dim = 128, f.widths = {4, 2, 1, 1};
//     clean::token t = clean::decode(page.data() + clean::tile_offset(place, f, 0, head, tile), f, 5);
//     use(t.channels, t.codes, t.row_scale_bits);
//
// Slow on purpose: one token, one channel, one bit field at a time. The section numbers are those of docs/format.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

namespace clean {

enum class side { key, value };
enum class kind { plan, fp16, bf16, fp8 };
enum class transform { identity, permutation, hadamard, basis };

/// All that is not in the bytes of a tile.
struct description {
  kind coding = kind::plan;
  side of = side::key;
  int head_dim = 128;
  std::vector<int> widths;  ///< plan: bits of a code, one per strip
  int leading = 0;          ///< plan, keys: leading components, 0..4
  transform turn = transform::identity;
  std::vector<float> column_scale;    ///< plan: one per channel; empty: the default step of the width
  std::vector<int> permutation;       ///< plan, transform::permutation: one per channel
  std::vector<float> basis;           ///< plan, transform::basis: a row of head_dim per transformed channel
  std::vector<float> leading_scale;   ///< plan: one per leading component
  float tensor_scale = 1.0f;          ///< fp8
  std::vector<float> channel_offset;  ///< plan: one per channel, original order; empty: none
};

/// One token of one tile. `codes` are plan codes, or the stored elements of the other formats.
struct token {
  std::vector<float> channels;
  std::vector<std::uint16_t> codes;
  std::vector<int> leading;
  std::uint16_t row_scale_bits = 0;
};

/// Where one side of the pages lies, in bytes from the start of its memory (section 2).
struct placement {
  std::size_t page_stride = 0;
  std::size_t head_stride = 0;
};

constexpr int tile_tokens = 64;

// ---- numbers -------------------------------------------------------------------------------------------------------

inline float float_from_bits(std::uint32_t bits) {
  float value = 0;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// 2^exponent, exact for every exponent used here (fp16, E4M3 and Hadamard factors are all normal floats).
inline float power_of_two(int exponent) { return float_from_bits(static_cast<std::uint32_t>(exponent + 127) << 23); }

inline float from_bf16(std::uint16_t bits) { return float_from_bits(static_cast<std::uint32_t>(bits) << 16); }

/// IEEE binary16: 1 sign, 5 exponent (bias 15), 10 mantissa bits. A NaN keeps its sign and payload, left aligned.
inline float from_fp16(std::uint16_t bits) {
  const int exponent = (bits >> 10) & 0x1f;
  const int mantissa = bits & 0x3ff;
  const std::uint32_t sign = static_cast<std::uint32_t>(bits >> 15) << 31;
  if (exponent == 31) return float_from_bits(sign | 0x7f800000u | static_cast<std::uint32_t>(mantissa) << 13);
  const float size = exponent == 0 ? static_cast<float>(mantissa) * power_of_two(-24)
                                   : static_cast<float>(1024 + mantissa) * power_of_two(exponent - 25);
  return sign != 0 ? -size : size;
}

/// OCP E4M3: 1 sign, 4 exponent (bias 7), 3 mantissa bits, no infinity; only all ones is NaN.
inline float from_e4m3(std::uint8_t bits) {
  const int exponent = (bits >> 3) & 0xf;
  const int mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return std::numeric_limits<float>::quiet_NaN();
  const float size = exponent == 0 ? static_cast<float>(mantissa) * power_of_two(-9)
                                   : static_cast<float>(8 + mantissa) * power_of_two(exponent - 10);
  return (bits & 0x80) != 0 ? -size : size;
}

/// Section 6: the default step of a width.
inline float default_step(int width) {
  switch (width) {
    case 1:
      return 1.596f;
    case 2:
      return 0.996f;
    case 3:
      return 0.586f;
    case 4:
      return 0.335f;
    case 8:
      return 0.0308f;
    default:
      return 0.0f;  // width 0 has no step
  }
}

/// Section 6: the Hadamard transform, its own inverse, on blocks of the largest power of two that divides the size.
inline void hadamard(std::vector<float>& y) {
  const std::size_t block = y.size() & (~y.size() + 1);  // the lowest set bit
  int log2 = 0;
  while ((std::size_t{1} << log2) < block) ++log2;
  constexpr float half_root_two = 0.70710678118654752440f;  // scaling by a power of two rounds nothing
  const float factor = (log2 % 2 != 0 ? half_root_two : 1.0f) * power_of_two(-(log2 / 2));

  for (std::size_t begin = 0; begin < y.size(); begin += block) {
    for (std::size_t stride = 1; stride < block; stride *= 2) {
      for (std::size_t i = 0; i < block; ++i) {
        if ((i & stride) != 0) continue;
        const float low = y[begin + i];
        const float high = y[begin + i + stride];
        y[begin + i] = low + high;
        y[begin + i + stride] = low - high;
      }
    }
  }
  for (float& channel : y) channel *= factor;
}

// ---- places of bytes, words and bits -------------------------------------------------------------------------------

inline int strip_channels(const description& f) { return f.of == side::key && f.head_dim != 64 ? 32 : 16; }

/// Words of a plane of `bits` bits (section 4).
inline int plane_words(const description& f, int bits) { return bits * 2 * strip_channels(f); }

inline int code_words(const description& f) {
  int words = 0;
  for (const int width : f.widths) words += plane_words(f, width);
  return words;
}

inline std::size_t tile_bytes(const description& f) {
  const auto elements = static_cast<std::size_t>(tile_tokens * f.head_dim);
  switch (f.coding) {
    case kind::fp8:
      return elements;
    case kind::fp16:
    case kind::bf16:
      return 2 * elements;
    case kind::plan:
      break;
  }
  return 4 * static_cast<std::size_t>(code_words(f)) + static_cast<std::size_t>(tile_tokens * (2 + f.leading));
}

/// Section 2: the first byte of a tile of a page.
inline std::size_t tile_offset(placement place, const description& f, std::size_t page, std::size_t head,
                               std::size_t tile) {
  return page * place.page_stride + head * place.head_stride + tile * tile_bytes(f);
}

/// Section 3: r(t).
inline int slot(int t) { return (t % 8) * 8 + (t / 16) * 2 + (t / 8) % 2; }

/// Section 4.1: the first word of the `bits`-bit plane of a strip, counted from the start of the tile.
inline int plane_begin(const description& f, int strip, int bits) {
  const int strips = static_cast<int>(f.widths.size());
  int word = 0;
  if (f.of == side::key) {
    for (int s = 0; s < strip; ++s) word += plane_words(f, f.widths[static_cast<std::size_t>(s)]);
    const bool second = f.widths[static_cast<std::size_t>(strip)] == 3 && bits == 1;
    return second ? word + plane_words(f, 2) : word;
  }

  struct section {
    int width_a, width_b, plane;  // the `plane`-bit planes of the strips of either width
  };
  constexpr section order[] = {{8, 8, 8}, {4, 4, 4}, {3, 2, 2}, {3, 3, 1}, {1, 1, 1}};
  for (const section part : order) {
    for (int s = 0; s < strips; ++s) {
      const int width = f.widths[static_cast<std::size_t>(s)];
      if (width != part.width_a && width != part.width_b) continue;
      if (s == strip && bits == part.plane) return word;
      word += plane_words(f, part.plane);
    }
  }
  throw std::logic_error("clean::plane_begin: this strip has no such plane");
}

/// Section 4.2: lane, word of the lane, and lowest bit of one field.
struct field {
  int lane, x, low;
};

inline field field_of(const description& f, int bits, int t, int cs) {
  const int j = t / 16;
  if (f.of == side::value) {
    const int lane = (cs % 8) * 4 + (t % 8) / 2;
    const int k = (t / 8) % 2;
    const int half = 16 * (t % 2) + 8 * (cs / 8);
    switch (bits) {
      case 8:
        return {lane, 2 * j + k, half};
      case 4:
        return {lane, j, half + 4 * k};
      case 2:
        return {lane, j / 2, half + 4 * (j % 2) + 2 * k};
      default:
        return {lane, 0, half + 2 * j + k};
    }
  }

  const int u = (t / 8) % 2;
  const int byte = 8 * (cs % 4);
  if (strip_channels(f) == 32) {
    const int lane = (t % 8) * 4 + (cs % 16) / 4;
    const int k = cs / 16;
    switch (bits) {
      case 8:
        return {lane, 4 * j + 2 * k + u, byte};
      case 4:
        return {lane, 2 * j + u, byte + 4 * k};
      case 2:
        return {lane, 2 * (j / 2) + u, byte + 4 * (j % 2) + 2 * k};
      default:
        return {lane, u, byte + 2 * j + k};
    }
  }
  const int lane = (t % 8) * 4 + cs / 4;
  switch (bits) {
    case 8:
      return {lane, 2 * j + u, byte};
    case 4:
      return {lane, 2 * (j / 2) + u, byte + 4 * (j % 2)};
    case 2:
      return {lane, u, byte + 2 * j};
    default:
      return {lane, 0, byte + 2 * j + u};
  }
}

inline std::uint16_t read_16(const std::uint8_t* bytes) { return static_cast<std::uint16_t>(bytes[0] | bytes[1] << 8); }

/// The field of `bits` bits of (token, channel of a strip).
inline int read_field(const std::uint8_t* tile, const description& f, int strip, int bits, int t, int cs) {
  const field place = field_of(f, bits, t, cs);
  const int m = plane_words(f, bits) / 32;
  const int v = m < 4 ? m : 4;
  const int word = plane_begin(f, strip, bits) + (place.x / v) * 32 * v + place.lane * v + place.x % v;
  const std::uint8_t* bytes = tile + 4 * static_cast<std::size_t>(word);
  const std::uint32_t value = read_16(bytes) | static_cast<std::uint32_t>(read_16(bytes + 2)) << 16;
  return static_cast<int>(value >> place.low & ((1u << bits) - 1u));
}

/// The code of (token, channel); 0 where the width is 0.
inline int read_code(const std::uint8_t* tile, const description& f, int t, int c) {
  const int strip = c / strip_channels(f);
  const int cs = c % strip_channels(f);
  const int width = f.widths[static_cast<std::size_t>(strip)];
  if (width == 0) return 0;
  if (width != 3) return read_field(tile, f, strip, width, t, cs);
  return read_field(tile, f, strip, 2, t, cs) | read_field(tile, f, strip, 1, t, cs) << 2;
}

// ---- tokens --------------------------------------------------------------------------------------------------------

/// Section 5.
inline token decode_elements(const std::uint8_t* tile, const description& f, int t) {
  token out;
  for (int c = 0; c < f.head_dim; ++c) {
    const auto index = static_cast<std::size_t>(t * f.head_dim + c);
    const std::uint16_t bits = f.coding == kind::fp8 ? tile[index] : read_16(tile + 2 * index);
    out.codes.push_back(bits);
    switch (f.coding) {
      case kind::fp8:
        out.channels.push_back(from_e4m3(static_cast<std::uint8_t>(bits)) * f.tensor_scale);
        break;
      case kind::bf16:
        out.channels.push_back(from_bf16(bits));
        break;
      default:
        out.channels.push_back(from_fp16(bits));
        break;
    }
  }
  return out;
}

/// Section 6.
inline token decode_plan(const std::uint8_t* tile, const description& f, int t) {
  const auto channels = static_cast<std::size_t>(f.head_dim);
  const auto leading = static_cast<std::size_t>(f.leading);
  const std::uint8_t* row_scales = tile + 4 * static_cast<std::size_t>(code_words(f));
  const std::uint8_t* components = row_scales + 2 * tile_tokens;

  token out;
  out.row_scale_bits = read_16(row_scales + 2 * slot(t));
  const float row_scale = from_fp16(out.row_scale_bits);
  for (std::size_t i = 0; i < leading; ++i) {
    const int byte = components[i * tile_tokens + static_cast<std::size_t>(slot(t))];
    out.leading.push_back(byte < 128 ? byte : byte - 256);
  }

  std::vector<float> y(channels, 0.0f);
  for (std::size_t c = 0; c < channels; ++c) {
    const int width = f.widths[c / static_cast<std::size_t>(strip_channels(f))];
    const int code = read_code(tile, f, t, static_cast<int>(c));
    out.codes.push_back(static_cast<std::uint16_t>(code));
    if (c < leading) {
      y[c] = f.leading_scale[c] * static_cast<float>(out.leading[c]);
    } else if (width > 0) {
      const float column_scale = f.column_scale.empty() ? default_step(width) : f.column_scale[c];
      const float step = row_scale * column_scale;
      const float centred = static_cast<float>(2 * code - ((1 << width) - 1)) * 0.5f;  // exact
      y[c] = step * centred;
    }
  }

  out.channels = y;
  if (f.turn == transform::hadamard) hadamard(out.channels);
  if (f.turn == transform::permutation) {
    for (std::size_t c = 0; c < channels; ++c) out.channels[static_cast<std::size_t>(f.permutation[c])] = y[c];
  }
  if (f.turn == transform::basis) {
    out.channels.assign(channels, 0.0f);
    for (std::size_t i = 0; i < channels; ++i) {
      for (std::size_t c = 0; c < channels; ++c) {
        const float part = y[i] * f.basis[i * channels + c];
        out.channels[c] = out.channels[c] + part;
      }
    }
  }
  for (std::size_t c = 0; c < f.channel_offset.size(); ++c) out.channels[c] = out.channels[c] + f.channel_offset[c];
  if (row_scale != row_scale) out.channels.assign(channels, std::numeric_limits<float>::quiet_NaN());
  return out;
}

/// Token `t` (0..63) of the tile that begins at `tile`.
inline token decode(const std::uint8_t* tile, const description& f, int t) {
  return f.coding == kind::plan ? decode_plan(tile, f, t) : decode_elements(tile, f, t);
}

}  // namespace clean

// SPDX-License-Identifier: Apache-2.0
// Golden pages: what tests/data/golden/manifest.txt says about each file, and the integer generator that makes the
// inputs. Nothing here includes packkv, and no library function rounds: every input is exact by construction.
//
//     for (const golden::page& p : golden::read_manifest(stream)) use(p.name, p.side[0].of_head(1));
#pragma once

#include <cstdint>
#include <cstring>
#include <istream>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "decoder.hpp"

namespace golden {

constexpr const char* side_names[] = {"key", "value"};
constexpr const char* kind_names[] = {"plan", "fp16", "bf16", "fp8"};
constexpr const char* transform_names[] = {"identity", "permutation", "hadamard", "basis"};

/// FNV-1a, 64 bits.
class fnv {
 public:
  void add(const std::uint8_t* bytes, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) hash_ = (hash_ ^ bytes[i]) * 0x100000001b3u;
  }
  /// The lowest `count` bytes of a value, least significant first.
  void add_value(std::uint32_t value, int count) {
    for (int i = 0; i < count; ++i) hash_ = (hash_ ^ (value >> 8 * i & 0xffu)) * 0x100000001b3u;
  }
  std::uint64_t value() const { return hash_; }

 private:
  std::uint64_t hash_ = 0xcbf29ce484222325u;
};

/// The bits of a float; every NaN counts as 0x7fc00000, as the format fixes no NaN bits.
inline std::uint32_t comparable_bits(float x) {
  if (x != x) return 0x7fc00000u;
  std::uint32_t bits = 0;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

/// One side of a page. Arrays of `format` hold all heads, one after the other.
struct one_side {
  clean::description format;
  std::uint64_t codes_fnv = 0;     ///< of all codes, 2 bytes each, ordered by (head, token, channel)
  std::uint64_t channels_fnv = 0;  ///< of all reconstructed floats, 4 bytes each, in the same order

  /// The description of one head, as the decoder takes it.
  clean::description of_head(int head) const {
    clean::description d = format;
    const auto cut = [head](auto& array, int count) {
      if (!array.empty()) array = {array.begin() + head * count, array.begin() + (head + 1) * count};
    };
    cut(d.column_scale, d.head_dim);
    cut(d.permutation, d.head_dim);
    cut(d.basis, d.head_dim * d.head_dim);
    cut(d.leading_scale, d.leading);
    cut(d.channel_offset, d.head_dim);
    return d;
  }
};

/// Replaces inputs: one channel of a token, or all of them where channel is -1.
struct edit {
  int side, head, token, channel;
  std::uint16_t bits;
};

/// A reconstructed channel, spelled out.
struct probe {
  int side, head, token, channel;
  std::uint32_t bits;
};

/// One file: the tiles of all heads of K, then those of V; strides are the smallest possible.
struct page {
  std::string name;
  int heads = 2;
  int tokens = 64;
  int tiles = 1;
  std::uint32_t seed = 0;
  bool bf16_input = false;
  one_side side[2];
  std::vector<edit> edits;
  std::uint64_t file_fnv = 0;
  std::vector<probe> probes;

  clean::placement place(int which) const {
    const std::size_t head_stride = clean::tile_bytes(side[which].format) * static_cast<std::size_t>(tiles);
    return {head_stride * static_cast<std::size_t>(heads), head_stride};
  }
  /// Byte of the file at which the tile of `token` begins.
  std::size_t tile_of(int which, int head, int token) const {
    const std::size_t begin = which == 0 ? 0 : place(0).page_stride;
    return begin + clean::tile_offset(place(which), side[which].format, 0, static_cast<std::size_t>(head),
                                      static_cast<std::size_t>(token / clean::tile_tokens));
  }
  std::size_t bytes() const { return place(0).page_stride + place(1).page_stride; }
};

// ---- inputs --------------------------------------------------------------------------------------------------------

constexpr const char* manifest_head =
    "# Golden pages of the packkv format, version 1 (docs/format.md). Written by make_golden.cpp.\n"
    "# NAME.bin holds one page: the tiles of K, head by head, then those of V; strides are the smallest possible.\n"
    "# Numbers are decimal; bits, hashes and floats (as their bits) are hexadecimal. Arrays hold head after head.\n"
    "#\n"
    "# Input element of (side 0 = K, head, token, channel), all operations on 32-bit unsigned integers:\n"
    "#   h = (((seed * 2 + side) * 8 + head) * 4096 + token) * 512 + channel\n"
    "#   h ^= h >> 16; h *= 0x7feb352d; h ^= h >> 15; h *= 0x846ca68b; h ^= h >> 16\n"
    "#   m = (sum of the four bytes of h) - 510, as a signed integer; bf16: m = m / 2, towards zero\n"
    "#   element = m * 2^(token % 5 - channel / 32 % 4 - 8), exact in fp16 and bf16; m = 0 gives +0\n"
    "# `set SIDE HEAD TOKEN CHANNEL BITS` replaces one element, `fill SIDE HEAD TOKEN BITS` all of a token;\n"
    "# of several that fit, the first counts.\n"
    "# FNV is 64-bit FNV-1a: of the file; of all codes (2 bytes each); of all reconstructed floats (4 bytes each,\n"
    "# NaN as 7fc00000), ordered by head, token, channel. `channel SIDE HEAD TOKEN CHANNEL BITS` spells some out.\n";

/// The bits of m * 2^exponent: fp16, or bf16. |m| must fit the significand and the result must be normal.
inline std::uint16_t exact_bits(int m, int exponent, bool bf16) {
  if (m == 0) return 0;
  const int mantissa_bits = bf16 ? 7 : 10;
  const int bias = bf16 ? 127 : 15;
  unsigned size = static_cast<unsigned>(m < 0 ? -m : m);
  exponent += mantissa_bits;
  for (; size < 1u << mantissa_bits; size *= 2) --exponent;
  const unsigned mantissa = size - (1u << mantissa_bits);
  const unsigned field = static_cast<unsigned>(exponent + bias) << mantissa_bits;
  return static_cast<std::uint16_t>((m < 0 ? 0x8000u : 0u) | field | mantissa);
}

/// One input element, as `manifest_head` defines it.
inline std::uint16_t input_bits(const page& p, int side, int head, int token, int channel) {
  for (const edit& e : p.edits) {
    const bool here = e.side == side && e.head == head && e.token == token;
    if (here && (e.channel < 0 || e.channel == channel)) return e.bits;
  }
  const auto u = [](int i) { return static_cast<std::uint32_t>(i); };
  std::uint32_t h = (((p.seed * 2 + u(side)) * 8 + u(head)) * 4096 + u(token)) * 512 + u(channel);
  h ^= h >> 16, h *= 0x7feb352du, h ^= h >> 15, h *= 0x846ca68bu, h ^= h >> 16;
  const int m = static_cast<int>((h & 0xff) + (h >> 8 & 0xff) + (h >> 16 & 0xff) + (h >> 24)) - 510;
  return exact_bits(p.bf16_input ? m / 2 : m, token % 5 - channel / 32 % 4 - 8, p.bf16_input);
}

// ---- the manifest --------------------------------------------------------------------------------------------------

namespace detail {

template <std::size_t N>
int index_of(const char* const (&names)[N], const std::string& name) {
  for (std::size_t i = 0; i < N; ++i)
    if (name == names[i]) return static_cast<int>(i);
  throw std::runtime_error("golden manifest: unknown word " + name);
}

template <class T>
T next(std::istream& line) {
  T value{};
  if (!(line >> value)) throw std::runtime_error("golden manifest: a value is missing");
  return value;
}
inline std::uint64_t next_hex(std::istream& line) { return std::stoull(next<std::string>(line), nullptr, 16); }
inline float next_float(std::istream& line) {
  return clean::float_from_bits(static_cast<std::uint32_t>(next_hex(line)));
}

inline std::string hex(std::uint64_t value, int digits) {
  std::string text;
  for (int i = digits - 1; i >= 0; --i) text += "0123456789abcdef"[value >> 4 * i & 15];
  return text;
}

inline void read_side_field(one_side& side, const std::string& field, std::istream& line) {
  clean::description& f = side.format;
  std::string rest;
  if (field == "kind") {
    f.coding = static_cast<clean::kind>(index_of(kind_names, next<std::string>(line)));
  } else if (field == "head_dim") {
    f.head_dim = next<int>(line);
  } else if (field == "widths") {
    for (int width = 0; line >> width;) f.widths.push_back(width);
  } else if (field == "transform") {
    f.turn = static_cast<clean::transform>(index_of(transform_names, next<std::string>(line)));
  } else if (field == "leading_scale") {
    while (line >> std::ws && !line.eof()) f.leading_scale.push_back(next_float(line));
  } else if (field == "leading") {
    f.leading = next<int>(line);
  } else if (field == "column_scale") {
    while (line >> std::ws && !line.eof()) f.column_scale.push_back(next_float(line));
  } else if (field == "permutation") {
    for (int channel = 0; line >> channel;) f.permutation.push_back(channel);
  } else if (field == "tensor_scale") {
    f.tensor_scale = next_float(line);
  } else if (field == "codes_fnv") {
    side.codes_fnv = next_hex(line);
  } else if (field == "channels_fnv") {
    side.channels_fnv = next_hex(line);
  } else {
    throw std::runtime_error("golden manifest: unknown field " + field);
  }
}

inline void read_field(page& p, const std::string& field, std::istream& line) {
  const std::size_t dot = field.find('.');
  if (dot != std::string::npos) {
    return read_side_field(p.side[index_of(side_names, field.substr(0, dot))], field.substr(dot + 1), line);
  }
  if (field == "heads") {
    p.heads = next<int>(line);
  } else if (field == "tokens") {
    p.tokens = next<int>(line);
  } else if (field == "tiles") {
    p.tiles = next<int>(line);
  } else if (field == "seed") {
    p.seed = next<std::uint32_t>(line);
  } else if (field == "input") {
    p.bf16_input = next<std::string>(line) == "bf16";
  } else if (field == "file_fnv") {
    p.file_fnv = next_hex(line);
  } else if (field == "set" || field == "fill" || field == "channel") {
    const int side = index_of(side_names, next<std::string>(line));
    const int head = next<int>(line);
    const int token = next<int>(line);
    const int channel = field == "fill" ? -1 : next<int>(line);
    const auto bits = static_cast<std::uint32_t>(next_hex(line));
    if (field == "channel") {
      p.probes.push_back({side, head, token, channel, bits});
    } else {
      p.edits.push_back({side, head, token, channel, static_cast<std::uint16_t>(bits)});
    }
  } else {
    throw std::runtime_error("golden manifest: unknown field " + field);
  }
}

/// `field` and its values, as many lines as they need.
template <class T, class Text>
void write_list(std::ostream& out, const std::string& field, const std::vector<T>& values, Text&& text) {
  constexpr std::size_t per_line = 8;
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (i % per_line == 0) out << (i == 0 ? "" : "\n") << field;
    out << ' ' << text(values[i]);
  }
  if (!values.empty()) out << '\n';
}

inline void write_side(std::ostream& out, const one_side& side, const std::string& name) {
  const clean::description& f = side.format;
  const auto decimal = [](int value) { return std::to_string(value); };
  const auto float_bits = [](float value) { return hex(comparable_bits(value), 8); };
  out << name << "kind " << kind_names[static_cast<int>(f.coding)] << '\n';
  out << name << "head_dim " << f.head_dim << '\n';
  if (f.coding == clean::kind::plan) {
    write_list(out, name + "widths", f.widths, decimal);
    out << name << "transform " << transform_names[static_cast<int>(f.turn)] << '\n';
    out << name << "leading " << f.leading << '\n';
    write_list(out, name + "leading_scale", f.leading_scale, float_bits);
    write_list(out, name + "column_scale", f.column_scale, float_bits);
    write_list(out, name + "permutation", f.permutation, decimal);
  }
  if (f.coding == clean::kind::fp8) out << name << "tensor_scale " << float_bits(f.tensor_scale) << '\n';
  out << name << "codes_fnv " << hex(side.codes_fnv, 16) << '\n';
  out << name << "channels_fnv " << hex(side.channels_fnv, 16) << '\n';
}

}  // namespace detail

inline std::vector<page> read_manifest(std::istream& in) {
  std::vector<page> pages;
  for (std::string text; std::getline(in, text);) {
    std::istringstream line(text);
    std::string field;
    if (!(line >> field) || field[0] == '#') continue;
    if (field == "page") {
      pages.emplace_back();
      pages.back().name = detail::next<std::string>(line);
      pages.back().side[1].format.of = clean::side::value;
    } else {
      detail::read_field(pages.at(pages.size() - 1), field, line);
    }
  }
  return pages;
}

inline void write_manifest(std::ostream& out, const std::vector<page>& pages) {
  out << manifest_head;
  for (const page& p : pages) {
    out << "\npage " << p.name << "\nheads " << p.heads << "\ntokens " << p.tokens << "\ntiles " << p.tiles;
    out << "\nseed " << p.seed << "\ninput " << (p.bf16_input ? "bf16" : "fp16") << '\n';
    for (const edit& e : p.edits) {
      out << (e.channel < 0 ? "fill " : "set ") << side_names[e.side] << ' ' << e.head << ' ' << e.token << ' ';
      if (e.channel >= 0) out << e.channel << ' ';
      out << detail::hex(e.bits, 4) << '\n';
    }
    for (int side = 0; side < 2; ++side) detail::write_side(out, p.side[side], std::string(side_names[side]) + '.');
    for (const probe& e : p.probes) {
      out << "channel " << side_names[e.side] << ' ' << e.head << ' ' << e.token << ' ' << e.channel << ' '
          << detail::hex(e.bits, 8) << '\n';
    }
    out << "file_fnv " << detail::hex(p.file_fnv, 16) << '\n';
  }
}

}  // namespace golden

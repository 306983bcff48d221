// SPDX-License-Identifier: Apache-2.0
// docs/format.md against the library: tests/format/decoder.hpp was written from that text alone, and must agree with
// packkv::reference to the bit on random pages, on pages of arbitrary bits, and on the golden pages of version 1.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <numeric>
#include <packkv/codec/pages.hpp>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../format/bridge.hpp"
#include "../support/catch.hpp"
#include "../support/small_tests.hpp"

namespace {

constexpr int head_dims[] = {64, 96, 128, 192, 256, 512};

/// Random numbers whose sequence no standard library may choose.
class random_source {
 public:
  explicit random_source(std::uint32_t seed) : engine_(seed) {}
  int below(int limit) { return static_cast<int>(engine_() % static_cast<std::uint32_t>(limit)); }
  std::uint32_t bits() { return static_cast<std::uint32_t>(engine_()); }
  /// (0, 1], all 24 bits of the significand in use.
  float fraction() { return static_cast<float>((bits() >> 8) + 1) * 0x1p-24f; }

 private:
  std::mt19937 engine_;
};

// ---- random pages --------------------------------------------------------------------------------------------------

golden::page random_page(random_source& random, int head_dim) {
  golden::page p;
  p.tiles = 1 + random.below(2);
  p.tokens = 1 + random.below(p.tiles * clean::tile_tokens);
  p.bf16_input = random.below(2) != 0;
  for (golden::one_side& side : p.side) side.format.head_dim = head_dim;
  p.side[1].format.of = clean::side::value;
  return p;
}

/// Widths of {0,1,2,3,4,8}, widest first. A small `kinds` makes long runs of one width.
void set_random_plan(random_source& random, clean::description& f) {
  constexpr int widths[] = {0, 1, 2, 3, 4, 8};
  const int kinds = 1 + random.below(6), first = random.below(7 - kinds);
  const int strips = f.head_dim / clean::strip_channels(f);
  for (int i = 0; i < strips; ++i) f.widths.push_back(widths[first + random.below(kinds)]);
  std::sort(f.widths.rbegin(), f.widths.rend());
}

void set_random_parameters(random_source& random, int heads, clean::description& f, bool calibrated) {
  for (int h = 0; h < heads; ++h) {
    for (int c = 0; c < f.head_dim && calibrated; ++c) f.column_scale.push_back(3.0f * random.fraction());
    for (int i = 0; i < f.leading; ++i) f.leading_scale.push_back(0.25f * random.fraction());
    for (int c = 0; c < f.head_dim && calibrated; ++c) f.channel_offset.push_back(2.0f * random.fraction() - 1.0f);
    if (f.turn == clean::transform::basis) {  // a reflection
      std::vector<float> axis;
      float square = 0.0f;
      for (int c = 0; c < f.head_dim; ++c) {
        axis.push_back(random.fraction() - 0.5f);
        square += axis.back() * axis.back();
      }
      for (std::size_t i = 0; i < axis.size(); ++i) {
        for (std::size_t c = 0; c < axis.size(); ++c) {
          f.basis.push_back((i == c ? 1.0f : 0.0f) - 2.0f * axis[i] * axis[c] / square);
        }
      }
    }
    if (f.turn != clean::transform::permutation) continue;
    std::vector<int> row(static_cast<std::size_t>(f.head_dim));
    std::iota(row.begin(), row.end(), 0);
    for (std::size_t i = row.size() - 1; i > 0; --i) {
      std::swap(row[i], row[static_cast<std::size_t>(random.below(static_cast<int>(i) + 1))]);
    }
    f.permutation.insert(f.permutation.end(), row.begin(), row.end());
  }
}

/// Inputs as 16-bit patterns. Tokens differ in size by 2^24, and some are zero, hold NaN or infinity, or are any bits.
struct random_inputs {
  random_source random;
  bool bf16;
  int token = -1;
  int mood = 0;
  float size = 1.0f;

  std::uint16_t operator()(int, int, int t, int c) {
    if (t != token || c == 0) {
      token = t;
      mood = random.below(24);
      size = std::ldexp(1.0f, random.below(24) - 16);
    }
    if (mood == 0) return static_cast<std::uint16_t>(random.below(2) << 15);
    if (mood == 1) return static_cast<std::uint16_t>(random.bits());
    if (mood == 2 && random.below(64) == 0) return static_cast<std::uint16_t>(random.below(2) != 0 ? 0x7fc1 : 0xff80);
    const float sum = random.fraction() + random.fraction() + random.fraction() + random.fraction() - 2.0f;
    return bf16 ? packkv::float_to_bfloat16(size * sum) : packkv::float_to_half(size * sum);
  }
};

// ---- comparing -----------------------------------------------------------------------------------------------------

/// The first difference of two reconstructions of a token in words; empty if there is none.
std::string difference(const clean::token& a, const clean::token& b) {
  std::ostringstream text;
  if (a.row_scale_bits != b.row_scale_bits) text << "row scale " << a.row_scale_bits << " or " << b.row_scale_bits;
  if (a.leading != b.leading) text << "leading components differ";
  if (a.channels.size() != b.channels.size() || a.codes.size() != b.codes.size()) text << "sizes differ";
  for (std::size_t c = 0; c < a.channels.size() && text.str().empty(); ++c) {
    const std::uint32_t bits_a = golden::comparable_bits(a.channels[c]);
    const std::uint32_t bits_b = golden::comparable_bits(b.channels[c]);
    if (a.codes[c] != b.codes[c]) text << "code of channel " << c << ": " << a.codes[c] << " or " << b.codes[c];
    if (bits_a != bits_b) text << " bits of channel " << c << ": " << std::hex << bits_a << " or " << bits_b;
  }
  return text.str();
}

/// The first token of the page on which the two decoders differ; empty if they agree.
std::string difference(const golden::page& p, const std::uint8_t* file) {
  for (int side = 0; side < 2; ++side) {
    for (int h = 0; h < p.heads; ++h) {
      const clean::description f = p.side[side].of_head(h);
      for (int t = 0; t < p.tokens; ++t) {
        const std::uint8_t* tile = file + p.tile_of(side, h, t);
        const clean::token ours = clean::decode(tile, f, t % clean::tile_tokens);
        const std::string found = difference(ours, bridge::decode(tile, p.side[side], h, t % clean::tile_tokens));
        if (found.empty()) continue;
        std::ostringstream where;
        where << golden::side_names[side] << " head " << h << " token " << t << ": " << found;
        return where.str();
      }
    }
  }
  return "";
}

std::string words_of(const golden::page& p) {
  std::ostringstream text;
  golden::write_manifest(text, {p});
  return text.str().substr(std::string(golden::manifest_head).size());
}

// ---- golden files --------------------------------------------------------------------------------------------------

std::string text_of(const std::string& name) {
  std::ifstream file(std::string(PACKKV_TEST_DATA) + "/golden/" + name, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

std::vector<golden::page> golden_pages() {
  std::istringstream manifest(text_of("manifest.txt"));
  return golden::read_manifest(manifest);
}

bridge::page_memory golden_file(const golden::page& p) {
  const std::string text = text_of(p.name + ".bin");
  bridge::page_memory memory(p.bytes());
  REQUIRE(text.size() == p.bytes());
  std::copy(text.begin(), text.end(), memory.data());
  return memory;
}

/// Decodes a golden page with `decode(tile, side, head, token)` and compares what the manifest recorded.
template <class Decode>
void check_recorded(const golden::page& p, const std::uint8_t* file, Decode&& decode) {
  for (int side = 0; side < 2; ++side) {
    INFO(golden::side_names[side]);
    golden::fnv codes, channels;
    for (int h = 0; h < p.heads; ++h) {
      for (int t = 0; t < p.tokens; ++t) {
        const clean::token token = decode(file + p.tile_of(side, h, t), p.side[side], h, t % clean::tile_tokens);
        for (const std::uint16_t code : token.codes) codes.add_value(code, 2);
        for (const float x : token.channels) channels.add_value(golden::comparable_bits(x), 4);
        for (const golden::probe& e : p.probes) {
          if (e.side != side || e.head != h || e.token != t) continue;
          INFO("head " << h << " token " << t << " channel " << e.channel);
          CHECK(golden::comparable_bits(token.channels[static_cast<std::size_t>(e.channel)]) == e.bits);
        }
      }
    }
    CHECK(codes.value() == p.side[side].codes_fnv);
    CHECK(channels.value() == p.side[side].channels_fnv);
  }
}

clean::token decode_by_text(const std::uint8_t* tile, const golden::one_side& side, int head, int token) {
  return clean::decode(tile, side.of_head(head), token);
}

}  // namespace

TEST_CASE("a decoder written from docs/format.md gives the bits of the reference for every plan", "[format]") {
  const int head_dim = GENERATE(from_range(std::begin(head_dims), std::end(head_dims)));
  const auto turn = GENERATE(clean::transform::identity, clean::transform::permutation, clean::transform::hadamard,
                             clean::transform::basis);
  const int leading = GENERATE(range(0, 5));
  const bool calibrated = GENERATE(false, true);
  const std::uint32_t repeats = packkv_test::small_tests ? 1 : 2;  // more than all others
  for (std::uint32_t repeat = 0; repeat < repeats; ++repeat) {
    const int variant = ((head_dim * 3 + static_cast<int>(turn)) * 5 + leading) * 2 + (calibrated ? 1 : 0);
    const std::uint32_t seed = static_cast<std::uint32_t>(variant) * 3 + repeat;
    random_source random(seed);
    golden::page p = random_page(random, head_dim);
    p.side[0].format.leading = leading;
    for (golden::one_side& side : p.side) {
      side.format.turn = turn;
      set_random_plan(random, side.format);
      set_random_parameters(random, p.heads, side.format, calibrated);
    }
    INFO("seed " << seed << '\n' << words_of(p));
    const auto memory = bridge::encode(p, random_inputs{random_source(seed + 1), p.bf16_input});
    REQUIRE(difference(p, memory.data()) == "");
  }
}

TEST_CASE("a decoder written from docs/format.md gives the bits of the reference for fp16, bf16 and fp8", "[format]") {
  const int head_dim = GENERATE(from_range(std::begin(head_dims), std::end(head_dims)));
  const auto key_kind = GENERATE(clean::kind::fp16, clean::kind::bf16, clean::kind::fp8);
  const auto value_kind = GENERATE(clean::kind::fp16, clean::kind::bf16, clean::kind::fp8);
  const int variant = (head_dim * 4 + static_cast<int>(key_kind)) * 4 + static_cast<int>(value_kind);
  const auto seed = static_cast<std::uint32_t>(variant);
  random_source random(seed);
  golden::page p = random_page(random, head_dim);
  p.side[0].format.coding = key_kind;
  p.side[1].format.coding = value_kind;
  for (golden::one_side& side : p.side) side.format.tensor_scale = random.fraction();
  INFO("seed " << seed << '\n' << words_of(p));
  const auto memory = bridge::encode(p, random_inputs{random_source(seed + 1), p.bf16_input});
  REQUIRE(difference(p, memory.data()) == "");
}

TEST_CASE("both decoders agree on tiles of arbitrary bits: every code, every element, components of -128", "[format]") {
  const int head_dim = GENERATE(from_range(std::begin(head_dims), std::end(head_dims)));
  const auto coding = GENERATE(clean::kind::plan, clean::kind::fp16, clean::kind::bf16, clean::kind::fp8);
  const std::uint32_t repeats = packkv_test::small_tests ? 4 : 12;
  for (std::uint32_t repeat = 0; repeat < repeats; ++repeat) {
    const std::uint32_t seed = repeat + 12 * static_cast<std::uint32_t>(head_dim * 4 + static_cast<int>(coding));
    random_source random(seed);
    golden::page p = random_page(random, head_dim);
    p.tokens = p.tiles * clean::tile_tokens;
    for (golden::one_side& side : p.side) {
      side.format.coding = coding;
      side.format.tensor_scale = 0.25f * random.fraction();
      if (coding != clean::kind::plan) continue;
      side.format.turn = static_cast<clean::transform>(random.below(4));
      if (side.format.of == clean::side::key) side.format.leading = random.below(5);
      set_random_plan(random, side.format);
      set_random_parameters(random, p.heads, side.format, repeat % 2 != 0);
    }
    bridge::page_memory memory(p.bytes());
    for (std::size_t i = 0; i < p.bytes(); ++i) memory.data()[i] = static_cast<std::uint8_t>(random.bits() >> 24);
    // Row scales are 0 .. 0x7bff or 0x7fff: no encoder writes any other, and docs/format.md gives them no meaning.
    for (int side = 0; side < 2 && coding == clean::kind::plan; ++side) {
      const clean::description& f = p.side[side].format;
      for (int h = 0; h < p.heads; ++h) {
        for (int t = 0; t < p.tokens; ++t) {
          std::uint8_t* scale = memory.data() + p.tile_of(side, h, t) + 4 * clean::code_words(f) + 2 * (t % 64);
          const int bits = random.below(16) == 0 ? 0x7fff : random.below(0x7c00);
          scale[0] = static_cast<std::uint8_t>(bits & 0xff), scale[1] = static_cast<std::uint8_t>(bits >> 8);
        }
      }
    }
    INFO("seed " << seed << '\n' << words_of(p));
    REQUIRE(difference(p, memory.data()) == "");
  }
}

TEST_CASE("the planes of a tile cover its code words once, for every plan", "[format]") {
  const int head_dim = GENERATE(from_range(std::begin(head_dims), std::end(head_dims)));
  const auto of = GENERATE(clean::side::key, clean::side::value);
  const std::uint32_t seed = static_cast<std::uint32_t>(head_dim * 2 + static_cast<int>(of));
  INFO("seed " << seed);
  random_source random(seed);
  clean::description f;
  f.of = of, f.head_dim = head_dim;
  set_random_plan(random, f);
  const packkv::codec_spec spec = bridge::spec_of(f);
  REQUIRE(static_cast<std::size_t>(spec.tile_bytes()) == clean::tile_bytes(f));
  std::vector<std::uint32_t> seen(static_cast<std::size_t>(spec.strips.words));
  bool twice = false;
  for (int t = 0; t < clean::tile_tokens; ++t) {
    for (int c = 0; c < head_dim; ++c) {
      const packkv::code_place place = packkv::locate(spec.strips, t, c);
      const auto take = [&](packkv::bit_field at, int bits) {
        const std::uint32_t mask = ((1u << bits) - 1u) << at.bit;
        twice = twice || (seen.at(static_cast<std::size_t>(at.word)) & mask) != 0;
        seen[static_cast<std::size_t>(at.word)] |= mask;
      };
      if (place.width > 0) take(place.low, place.width == 3 ? 2 : place.width);
      if (place.width == 3) take(place.high, 1);
    }
  }
  CHECK_FALSE(twice);
  CHECK(std::count(seen.begin(), seen.end(), 0xffffffffu) == spec.strips.words);
}

TEST_CASE("a tile lies where section 2 of docs/format.md says, for any strides", "[format]") {
  const std::uint32_t seed = GENERATE(range(1u, 20u));
  INFO("seed " << seed);
  random_source random(seed);
  golden::page p = random_page(random, 128);
  for (golden::one_side& side : p.side) set_random_plan(random, side.format);
  std::vector<std::uint8_t> memory(1);
  packkv::pages_view pages;
  pages.key_data = pages.value_data = memory.data();
  for (std::int64_t* stride :
       {&pages.key_page_stride, &pages.key_head_stride, &pages.value_page_stride, &pages.value_head_stride}) {
    *stride = std::int64_t{16} * random.below(1 << 30);
  }
  const int page = random.below(1 << 10), head = random.below(64), tile = random.below(8);
  const auto size = [](std::int64_t stride) { return static_cast<std::size_t>(stride); };
  const clean::placement places[] = {{size(pages.key_page_stride), size(pages.key_head_stride)},
                                     {size(pages.value_page_stride), size(pages.value_head_stride)}};
  const packkv::codec_spec key = bridge::spec_of(p.side[0].format), value = bridge::spec_of(p.side[1].format);
  const auto address = [](const void* at) { return reinterpret_cast<std::uintptr_t>(at); };
  const std::uintptr_t found[] = {address(packkv::detail::key_tile(pages, key, page, head, tile)),
                                  address(packkv::detail::value_tile(pages, value, page, head, tile))};
  for (int side = 0; side < 2; ++side) {
    const std::size_t offset = clean::tile_offset(places[side], p.side[side].format, static_cast<std::size_t>(page),
                                                  static_cast<std::size_t>(head), static_cast<std::size_t>(tile));
    CHECK(found[side] - address(memory.data()) == offset);
  }
}

TEST_CASE("golden pages decode by docs/format.md to the recorded codes and floats", "[format][golden]") {
  const std::vector<golden::page> pages = golden_pages();
  REQUIRE(pages.size() >= 11);
  for (const golden::page& p : pages) {
    INFO(p.name);
    REQUIRE(p.probes.size() >= 8);
    check_recorded(p, golden_file(p).data(), decode_by_text);
  }
}

TEST_CASE("the reference decodes golden pages to the recorded codes and floats", "[format][golden]") {
  for (const golden::page& p : golden_pages()) {
    INFO(p.name);
    check_recorded(p, golden_file(p).data(), bridge::decode);
  }
}

TEST_CASE("the encoder still writes the golden pages, byte for byte", "[format][golden]") {
  for (const golden::page& p : golden_pages()) {
    INFO(p.name);
    const bridge::page_memory file = golden_file(p);
    const bridge::page_memory today = bridge::encode(p);
    const auto differing = std::mismatch(file.data(), file.data() + p.bytes(), today.data()).first - file.data();
    CHECK(static_cast<std::size_t>(differing) == p.bytes());
    golden::fnv all;
    all.add(file.data(), p.bytes());
    CHECK(all.value() == p.file_fnv);
  }
}

TEST_CASE("the golden manifest has no field that the tests do not read", "[format][golden]") {
  std::ostringstream again;
  golden::write_manifest(again, golden_pages());
  CHECK(again.str() == text_of("manifest.txt"));
}

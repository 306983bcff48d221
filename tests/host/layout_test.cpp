// SPDX-License-Identifier: Apache-2.0
#include <packkv/codec/codec.hpp>
#include <packkv/codec/layout.hpp>
#include <packkv/codec/pages.hpp>

#include "fixture.hpp"

namespace pk = packkv;
using namespace host_test;

namespace {

constexpr int head_dims[] = {64, 96, 128, 192, 256, 512};
constexpr pk::side sides[] = {pk::side::key, pk::side::value};

/// One field of a code, as docs/format.md section 4 places it.
struct field {
  int word, bit, bits;
};

/// docs/format.md 4.1: first word of the plane of `bits` bits of a strip; `second` asks for the 1-bit plane of a
/// width 3.
int document_plane(pk::side which, const pk::strip_widths& plan, int channels, int strip, bool second) {
  const int unit = 2 * channels;
  int at = 0;
  if (which == pk::side::key) {
    for (int i = 0; i < strip; ++i) at += plan.width[i] * unit;
    return second ? at + 2 * unit : at;
  }
  // Sections: (width, bits of the plane, is it the second plane of a 3).
  const struct {
    int width, also, bits;
    bool second;
  } sections[] = {{8, 8, 8, false}, {4, 4, 4, false}, {3, 2, 2, false}, {3, 3, 1, true}, {1, 1, 1, false}};
  for (const auto& section : sections)
    for (int i = 0; i < plan.count; ++i) {
      const int w = plan.width[i];
      if (w != section.width && w != section.also) continue;
      if (i == strip && section.second == second) return at;
      at += section.bits * unit;
    }
  return -1;
}

/// docs/format.md 4.2.
field document_field(pk::side which, int channels, int base, int b, int t, int c) {
  const int cs = c % channels, m = b * 2 * channels / 32;
  const int j = t / 16, u = t / 8 % 2, y = cs % 4;
  int l = 0, x = 0, low = 0;
  if (which == pk::side::key && channels == 32) {
    const int k = cs / 16;
    l = (t % 8) * 4 + (cs % 16) / 4;
    if (b == 8) x = 4 * j + 2 * k + u, low = 8 * y;
    if (b == 4) x = 2 * j + u, low = 8 * y + 4 * k;
    if (b == 2) x = 2 * (j / 2) + u, low = 8 * y + 4 * (j % 2) + 2 * k;
    if (b == 1) x = u, low = 8 * y + 2 * j + k;
  } else if (which == pk::side::key) {
    l = (t % 8) * 4 + cs / 4;
    if (b == 8) x = 2 * j + u, low = 8 * y;
    if (b == 4) x = 2 * (j / 2) + u, low = 8 * y + 4 * (j % 2);
    if (b == 2) x = u, low = 8 * y + 2 * j;
    if (b == 1) x = 0, low = 8 * y + 2 * j + u;
  } else {
    const int k = t / 8 % 2, e = t % 2, upper = cs / 8;
    l = (cs % 8) * 4 + (t % 8) / 2;
    if (b == 8) x = 2 * j + k, low = 16 * e + 8 * upper;
    if (b == 4) x = j, low = 16 * e + 8 * upper + 4 * k;
    if (b == 2) x = j / 2, low = 16 * e + 8 * upper + 4 * (j % 2) + 2 * k;
    if (b == 1) x = 0, low = 16 * e + 8 * upper + 2 * j + k;
  }
  const int v = m < 4 ? m : 4;
  return {base + (x / v) * 32 * v + l * v + x % v, low, b};
}

constexpr pk::strip_widths widths(std::initializer_list<int> list) {
  pk::strip_widths w;
  for (const int x : list) w.width[w.count++] = static_cast<std::uint8_t>(x);
  return w;
}
constexpr pk::status_code plan_code(pk::side which, int head_dim, std::initializer_list<int> list) {
  return pk::check_plan(which, head_dim, widths(list)).code;
}

// The compile-time door of key_codec and value_codec.
static_assert(plan_code(pk::side::key, 128, {4, 2, 1, 1}) == pk::status_code::ok);
static_assert(plan_code(pk::side::key, 64, {8, 3, 1, 0}) == pk::status_code::ok);
static_assert(plan_code(pk::side::key, 96, {4, 2, 1}) == pk::status_code::ok);
static_assert(plan_code(pk::side::value, 64, {2, 2, 2, 2}) == pk::status_code::ok);
static_assert(plan_code(pk::side::key, 128, {0, 0, 0, 0}) == pk::status_code::ok);
static_assert(plan_code(pk::side::key, 128, {4, 2, 1}) == pk::status_code::invalid_argument);
static_assert(plan_code(pk::side::key, 128, {4, 2, 1, 1, 1}) == pk::status_code::invalid_argument);
static_assert(plan_code(pk::side::key, 128, {1, 2, 4, 4}) == pk::status_code::invalid_argument);
static_assert(plan_code(pk::side::key, 128, {5, 2, 1, 1}) == pk::status_code::invalid_argument);
static_assert(plan_code(pk::side::key, 128, {7, 6, 1, 1}) == pk::status_code::invalid_argument);
static_assert(plan_code(pk::side::key, 128, {16, 2, 1, 1}) == pk::status_code::invalid_argument);
static_assert(plan_code(pk::side::key, 128, {}) == pk::status_code::invalid_argument);
static_assert(plan_code(pk::side::key, 80, {4, 2}) == pk::status_code::unsupported);
static_assert(plan_code(pk::side::key, 0, {}) == pk::status_code::unsupported);
static_assert(plan_code(pk::side::value, 128, {4, 2, 1, 1}) == pk::status_code::invalid_argument);

using pk::identity;
using pk::rms_scale;
using flagship = pk::cache_format<pk::key_codec<128, identity, rms_scale, pk::plan<4, 2, 1, 1>>,
                                  pk::value_codec<128, pk::hadamard, rms_scale, pk::plan<2, 2, 2, 2, 2, 2, 2, 2>>>;
static_assert(flagship::key_tile_bytes == 2176 && flagship::value_tile_bytes == 2176);  // 2.125 bits per value
static_assert(flagship::key_tile_bytes + flagship::value_tile_bytes == 4352);           // ENGINES.md 1
static_assert(flagship::key().bits_per_value() == 2.125);
static_assert(pk::key_codec<128, identity, rms_scale, pk::plan<4, 2, 1, 1>, pk::leading<1>>::spec().tile_bytes() ==
              2240);
static_assert(pk::key_codec<64, identity, rms_scale, pk::plan<4, 2, 1, 1>>::spec().tile_bytes() == 1024 + 128);
static_assert(pk::key_codec<96, identity, rms_scale, pk::plan<3, 0, 0>>::spec().tile_bytes() == 3 * 32 * 8 + 128);
static_assert(pk::float16_codec<192>::spec().tile_bytes() == 64 * 192 * 2);
static_assert(pk::bfloat16_codec<64>::spec().tile_bytes() == 64 * 64 * 2);
static_assert(pk::fp8_codec<512>::spec().tile_bytes() == 64 * 512);
static_assert(pk::locate(flagship::key().strips, 0, 0).width == 4);  // usable at compile time
static_assert(pk::row_slot(63) == 63 && pk::row_slot(0) == 0 && pk::row_slot(8) == 1 && pk::row_slot(1) == 8);

}  // namespace

TEST_CASE("locate is the map of docs/format.md for random plans of every head dim and side", "[layout]") {
  int wrong = 0;
  for (const int d : head_dims)
    for (const pk::side which : sides)
      for (int round = 0; round < 12; ++round) {
        const std::uint64_t seed = seed_of(100 + static_cast<std::uint64_t>(d * 64 + round));
        INFO("seed " << seed << " head_dim " << d);
        random_source random(seed);
        const pk::strip_widths plan = random_plan(random, which, d);
        const pk::strip_layout strips = pk::make_strips(which, d, plan);
        const int channels = pk::strip_channels(which, d);
        for (int t = 0; t < 64; ++t)
          for (int c = 0; c < d; ++c) {
            const int s = c / channels, w = plan.width[s], b = w == 3 ? 2 : w;
            const pk::code_place p = pk::locate(strips, t, c);
            if (p.width != w) ++wrong;
            if (w == 0) continue;
            const field low = document_field(which, channels, document_plane(which, plan, channels, s, false), b, t, c);
            if (p.low.word != low.word || p.low.bit != low.bit) ++wrong;
            if (w != 3) continue;
            const field high = document_field(which, channels, document_plane(which, plan, channels, s, true), 1, t, c);
            if (p.high.word != high.word || p.high.bit != high.bit) ++wrong;
          }
        REQUIRE(wrong == 0);
      }
}

TEST_CASE("the fields of all codes fill every bit of a tile's words exactly once", "[layout]") {
  for (const int d : head_dims)
    for (const pk::side which : sides)
      for (int round = 0; round < 12; ++round) {
        const std::uint64_t seed = seed_of(2000 + static_cast<std::uint64_t>(d * 64 + round));
        INFO("seed " << seed << " head_dim " << d);
        random_source random(seed);
        const pk::strip_widths plan =
            round < 6 ? flat_plan(which, d, round == 5 ? 8 : round) : random_plan(random, which, d);
        const pk::strip_layout strips = pk::make_strips(which, d, plan);
        std::vector<std::uint32_t> used(static_cast<std::size_t>(strips.words), 0u);
        int wrong = 0, bits = 0;
        for (int i = 0; i < plan.count; ++i) bits += plan.width[i];
        REQUIRE(strips.words == bits * 2 * pk::strip_channels(which, d));
        for (int t = 0; t < 64; ++t)
          for (int c = 0; c < d; ++c)
            for_each_write(
                pk::locate(strips, t, c), 0xffu, [&](std::int32_t w, std::uint32_t mask, std::uint32_t ones) {
                  if (w < 0 || w >= strips.words || ones != mask || (used[static_cast<std::size_t>(w)] & mask) != 0)
                    return void(++wrong);
                  used[static_cast<std::size_t>(w)] |= mask;
                });
        for (const std::uint32_t w : used) wrong += w != 0xffffffffu;
        REQUIRE(wrong == 0);
      }
}

TEST_CASE("codes written in any order are read back, and writing one changes no other", "[layout]") {
  for (const int d : head_dims)
    for (const pk::side which : sides) {
      const std::uint64_t seed = seed_of(5000 + static_cast<std::uint64_t>(d));
      INFO("seed " << seed << " head_dim " << d);
      random_source random(seed);
      const pk::strip_layout strips = pk::make_strips(which, d, random_plan(random, which, d));
      std::vector<std::uint32_t> words(static_cast<std::size_t>(strips.words) + 1, 0xffffffffu);
      std::vector<std::uint32_t> codes(static_cast<std::size_t>(64 * d));
      std::vector<int> order(codes.size());
      for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
      random.shuffle(order);
      order.insert(order.end(), order.begin(), order.begin() + 100);  // some are written twice
      for (const int i : order) {
        const pk::code_place p = pk::locate(strips, i / d, i % d);
        const auto code = static_cast<std::uint32_t>(random.below(1 << p.width));
        codes[static_cast<std::size_t>(i)] = code;
        for_each_write(p, code, [&](std::int32_t w, std::uint32_t mask, std::uint32_t bits) {
          auto& word = words[static_cast<std::size_t>(w)];
          word = (word & ~mask) | bits;
        });
      }
      int wrong = 0;
      for (int i = 0; i < 64 * d; ++i)
        wrong += pk::read_code(words.data(), pk::locate(strips, i / d, i % d)) != codes[static_cast<std::size_t>(i)];
      CHECK(wrong == 0);
      CHECK(words.back() == 0xffffffffu);
    }
}

TEST_CASE("row_slot is the permutation of docs/format.md", "[layout]") {
  std::uint64_t seen = 0;
  int wrong = 0;
  for (int t = 0; t < 64; ++t) {
    wrong += pk::row_slot(t) != (t % 8) * 8 + (t / 16) * 2 + (t / 8) % 2;
    seen |= std::uint64_t{1} << pk::row_slot(t);
  }
  CHECK(wrong == 0);
  CHECK(seen == ~std::uint64_t{0});
}

TEST_CASE("wrong plans, codecs and formats are refused", "[layout]") {
  using code = pk::status_code;
  const pk::strip_widths good = widths({4, 2, 1, 1});
  pk::codec_spec spec = pk::make_plan_codec(pk::side::key, 128, pk::transform_kind::identity, good);
  CHECK(pk::check_codec(pk::side::key, spec));
  CHECK(pk::check_codec(pk::side::value, spec).code == code::invalid_argument);  // strips of the other side
  for (int w = 0; w < 256; ++w) {
    pk::strip_widths plan = good;
    plan.width[0] = static_cast<std::uint8_t>(w);
    const bool fine = w == 2 || w == 3 || w == 4 || w == 8;
    CHECK((pk::check_plan(pk::side::key, 128, plan).code == code::ok) == fine);
  }
  for (int d = -8; d <= 1024; ++d) {
    bool known = false;
    for (const int h : head_dims) known = known || d == h;
    CHECK(pk::is_head_dim(d) == known);
  }
  const auto with = [&](auto&& change) {
    pk::codec_spec s = spec;
    change(s);
    return pk::check_codec(pk::side::key, s).code;
  };
  CHECK(with([](auto& s) { s.head_dim = 100; }) == code::unsupported);
  CHECK(with([](auto& s) { s.head_dim = 256; }) == code::invalid_argument);
  CHECK(with([](auto& s) { s.leading = 4; }) == code::ok);
  CHECK(with([](auto& s) { s.leading = 5; }) == code::invalid_argument);
  CHECK(with([](auto& s) { s.leading = -1; }) == code::invalid_argument);
  CHECK(with([](auto& s) { s.kind = static_cast<pk::codec_kind>(5); }) == code::invalid_argument);
  CHECK(with([](auto& s) { s.transform = static_cast<pk::transform_kind>(4); }) == code::invalid_argument);
  CHECK(with([](auto& s) { s.strips.count = 33; }) == code::invalid_argument);
  CHECK(with([](auto& s) { s.strips.count = -1; }) == code::invalid_argument);
  CHECK(with([](auto& s) { s.strips.width[1] = 5; }) == code::invalid_argument);
  CHECK(with([](auto& s) { s.kind = pk::codec_kind::fp8, s.leading = 1; }) == code::unsupported);
  CHECK(with([](auto& s) { s.kind = pk::codec_kind::float16, s.transform = pk::transform_kind::hadamard; }) ==
        code::unsupported);
  pk::codec_spec value =
      pk::make_plan_codec(pk::side::value, 128, pk::transform_kind::identity, flat_plan(pk::side::value, 128, 2), 1);
  CHECK(pk::check_codec(pk::side::value, value).code == code::unsupported);
  pk::runtime_format<128> format;
  CHECK(pk::check_format(format));
  format.key_spec.head_dim = 64;
  CHECK(pk::check_format(format).code == code::shape_mismatch);
}

TEST_CASE("a codec whose strips were not made by make_strips is refused", "[layout]") {
  const pk::codec_spec spec =
      pk::make_plan_codec(pk::side::key, 128, pk::transform_kind::identity, widths({4, 3, 1, 1}));
  const auto refused = [&](auto&& change) {
    pk::codec_spec s = spec;
    change(s);
    return !pk::check_codec(pk::side::key, s);
  };
  CHECK(refused([](auto& s) { s.strips.words = 0; }));
  CHECK(refused([](auto& s) { s.strips.low[1] = 60000; }));
  CHECK(refused([](auto& s) { s.strips.high[1] = 1; }));
  CHECK(refused([](auto& s) { s.strips.channels = 16; }));
}

// SPDX-License-Identifier: Apache-2.0
// Grouped codecs in pages: their tiles are those of the grouped formats, incomplete tiles, checks, ids.
#include <packkv/cache/blob.hpp>

#include "grouped_fixture.hpp"

using namespace host_test;
using namespace grouped_test;
using code = pk::status_code;

namespace {

/// One side, paged: an element codec of the other side comes along.
struct paged {
  using format = pk::runtime_format<128>;
  format f;
  tensor16 other;
  std::vector<std::uint8_t> storage;
  pk::pages_view pages;
  pk::device_report report;

  paged(const pk::codec_spec& spec, const tensor16& x) : other(x.heads, x.tokens, 128) {
    const bool key = spec.strips.which == pk::side::key;
    (key ? f.key_spec : f.value_spec) = spec;
    const int tiles = (x.tokens + 63) / 64;
    const std::int64_t k = pk::key_page_bytes(f, tiles), v = pk::value_page_bytes(f, tiles);
    storage.assign(static_cast<std::size_t>(x.heads * (k + v)) + 16, 0xa5);
    auto* const base = storage.data() + (16 - reinterpret_cast<std::uintptr_t>(storage.data()) % 16) % 16;
    pages.key_data = base;
    pages.value_data = base + x.heads * k;
    pages.key_head_stride = k;
    pages.value_head_stride = v;
    pages.key_page_stride = x.heads * k;
    pages.value_page_stride = x.heads * v;
    pages.num_pages = 1;
    pages.kv_heads = x.heads;
    pages.tiles_per_page = tiles;
  }
  pk::status compress(const tensor16& x, const std::vector<float>* offsets = nullptr) {
    pk::parameters<format> p{f, {}, {}};
    const bool key = f.key_spec.kind == pk::codec_kind::grouped;
    if (offsets != nullptr) (key ? p.key : p.value).channel_offset = offsets->data();
    pk::page_table table;
    table.row_stride = 1;
    const auto batch = [](const tensor16& t) {
      return pk::make_input<4>(t.bits.data(), pk::dtype::float16, {1, t.heads, t.tokens, t.dim});
    };
    return pk::reference::compress(batch(key ? x : other), batch(key ? other : x), nullptr, p, pages, table, report);
  }
  const std::uint8_t* tile(int head, int i) const {
    return f.key_spec.kind == pk::codec_kind::grouped ? pk::key_tile(pages, f.key_spec, 0, head, i)
                                                      : pk::value_tile(pages, f.value_spec, 0, head, i);
  }
  const pk::codec_spec& spec() const { return f.key_spec.kind == pk::codec_kind::grouped ? f.key_spec : f.value_spec; }
};

pk::codec_spec codec_of(const pk::grouped_spec& s) {
  return pk::make_grouped_codec(s.which, s.head_dim, s.width, s.group, s.transform);
}

}  // namespace

TEST_CASE("tiles of grouped codecs are those of the grouped formats, byte for byte", "[paged]") {
  random_source random(seed_of(1201));
  for (const int width : {1, 2, 3, 4, 8})
    for (const auto transform : {pk::transform_kind::identity, pk::transform_kind::hadamard})
      for (const auto& [which, group] :
           {std::pair(pk::side::key, 32), std::pair(pk::side::key, 64), std::pair(pk::side::value, 16),
            std::pair(pk::side::value, 32), std::pair(pk::side::value, 128)}) {
        const auto axis = which == pk::side::key ? pk::group_axis::channel : pk::group_axis::vector;
        const auto spec = pk::make_grouped(which, 128, axis, group, width, pk::step_rule::min_max, transform);
        const tensor16 x = random_tensor(random, 2, 192, 128);
        pk::grouped_layout layout;
        REQUIRE(pk::make_grouped_layout(spec, 2, 192, 0, layout));
        aligned_bytes bytes(layout.total_bytes);
        pk::device_report report;
        REQUIRE(pk::reference::encode_grouped(spec, x.view(), 0, bytes.data(), bytes.size(), report));
        paged p(codec_of(spec), x);
        REQUIRE(p.compress(x));
        REQUIRE(p.spec().tile_bytes() == spec.tile_bytes());
        CHECK(p.spec().bits_per_value() == width + 32.0 / group);
        for (int h = 0; h < 2; ++h)
          for (int i = 0; i < 3; ++i) {
            const auto* const expected =
                bytes.data() + layout.blocks_offset + i * spec.block_bytes(2) + pk::grouped_tile_offset(spec, h, 0);
            CHECK(std::memcmp(p.tile(h, i), expected, static_cast<std::size_t>(spec.tile_bytes())) == 0);
          }
        CHECK(p.report.flags == 0);
      }
}

TEST_CASE("an incomplete tile has groups of its tokens alone, and zero bytes behind", "[paged]") {
  random_source random(seed_of(1202));
  for (const int tokens : {1, 31, 32, 33, 63}) {
    tensor16 x = random_tensor(random, 1, tokens, 128);
    const auto spec = pk::make_grouped_codec(pk::side::key, 128, 4, 32);
    paged p(spec, x);
    REQUIRE(p.compress(x));
    for (int c = 0; c < 128; ++c)
      for (int first = 0; first < 64; first += 32) {
        float lowest = INFINITY, highest = -INFINITY;
        for (int t = first; t < std::min(first + 32, tokens); ++t) {
          lowest = std::min(lowest, x.value(0, t, c));
          highest = std::max(highest, x.value(0, t, c));
        }
        std::uint16_t most, least;
        std::memcpy(&most, p.tile(0, 0) + spec.maximum_offset(spec.group_of(first, c)), 2);
        std::memcpy(&least, p.tile(0, 0) + spec.minimum_offset(spec.group_of(first, c)), 2);
        CHECK(clean::from_fp16(most) == (first < tokens ? highest : 0.0f));
        CHECK(clean::from_fp16(least) == (first < tokens ? lowest : 0.0f));
        for (int t = first; t < first + 32; ++t) {
          const std::uint32_t stored =
              pk::read_code(reinterpret_cast<const std::uint32_t*>(p.tile(0, 0)), pk::locate(spec.strips, t, c));
          if (t >= tokens) {
            CHECK(stored == 0);
          } else {
            const float y = lowest + (highest - lowest) / 15.0f * static_cast<float>(stored);
            CHECK(std::abs(y - x.value(0, t, c)) <= (highest - lowest) / 30.0f * 1.001f);
          }
        }
      }
  }
}

TEST_CASE("grouped codecs subtract channel offsets, and give them back", "[paged]") {
  random_source random(seed_of(1203));
  for (const auto which : {pk::side::key, pk::side::value}) {
    tensor16 x(2, 70, 128), shifted(2, 70, 128);
    std::vector<float> offsets(2 * 128);
    for (std::size_t i = 0; i < offsets.size(); ++i) offsets[i] = static_cast<float>(static_cast<int>(i % 9) - 4);
    for (int h = 0; h < 2; ++h)
      for (int t = 0; t < 70; ++t)
        for (int c = 0; c < 128; ++c) {
          const float y = static_cast<float>(random.below(256)) / 16.0f - 8.0f;  // exact, as are the sums
          shifted.bits[x.at(h, t, c)] = pk::float_to_half(y);
          x.bits[x.at(h, t, c)] = pk::float_to_half(y + offsets[static_cast<std::size_t>(h) * 128 + c]);
        }
    const auto spec = pk::make_grouped_codec(which, 128, 8, which == pk::side::key ? 64 : 128);
    paged with(spec, x), without(spec, shifted);
    REQUIRE(with.compress(x, &offsets));
    REQUIRE(without.compress(shifted));
    for (int h = 0; h < 2; ++h)
      for (int i = 0; i < 2; ++i)
        CHECK(std::memcmp(with.tile(h, i), without.tile(h, i), static_cast<std::size_t>(spec.tile_bytes())) == 0);
    float got[128];
    pk::head_parameters head;
    head.channel_offset = offsets.data() + 128;
    pk::reference::decode_token(spec, head, with.tile(1, 1), 5, got);
    for (int c = 0; c < 128; ++c) CHECK(std::abs(got[c] - x.value(1, 69, c)) < 0.04f);  // a step is 16 / 255 at most
  }
}

TEST_CASE("grouped codecs: what cannot be coded is NaN and reported", "[paged]") {
  random_source random(seed_of(1204));
  for (const auto which : {pk::side::key, pk::side::value})
    for (const bool infinite : {true, false}) {
      tensor16 x = random_tensor(random, 1, 64, 128);
      const float large = 60000.0f;
      x.bits[x.at(0, 40, 3)] = infinite ? std::uint16_t{0x7c00} : pk::float_to_half(large);
      std::vector<float> offsets(128, 0.0f);
      offsets[3] = -large;  // beyond the range of halves, though every token is finite
      const auto spec = pk::make_grouped_codec(which, 128, 2, 32);
      paged p(spec, x);
      REQUIRE(p.compress(x, infinite ? nullptr : &offsets));
      CHECK(p.report.flags == (infinite ? pk::report_nonfinite_input : pk::report_scale_overflow));
      for (int t = 0; t < 64; ++t)
        for (int c = 0; c < 128; ++c) {
          float got[128];
          pk::head_parameters head;
          if (!infinite) head.channel_offset = offsets.data();
          if (c == 0) pk::reference::decode_token(spec, head, p.tile(0, 0), t, got);
          if (c > 0) continue;
          for (int i = 0; i < 128; ++i)
            CHECK(std::isnan(got[i]) == (which == pk::side::key ? i == 3 && t >= 32 : i < 32 && t == 40));
        }
    }
}

TEST_CASE("grouped codecs that no kernel reads are refused", "[paged]") {
  const auto check = [](pk::side which, int dim, int width, int group,
                        pk::transform_kind transform = pk::transform_kind::identity) {
    return pk::check_codec(which, pk::make_grouped_codec(which, dim, width, group, transform)).code;
  };
  for (const int dim : {64, 96, 128, 192, 256, 512})
    for (const int width : {1, 2, 3, 4, 8}) {
      CHECK(check(pk::side::key, dim, width, 32) == code::ok);
      CHECK(check(pk::side::key, dim, width, 64, pk::transform_kind::hadamard) == code::ok);
      CHECK(check(pk::side::value, dim, width, 16) == code::ok);
      CHECK(check(pk::side::value, dim, width, dim) == code::ok);
    }
  for (const int group : {-1, 0, 16, 33, 96, 128, 100000}) CHECK(check(pk::side::key, 128, 2, group) != code::ok);
  for (const int group : {-16, 0, 8, 24, 48, 256, 70000}) CHECK(check(pk::side::value, 128, 2, group) != code::ok);
  for (const int width : {-1, 0, 5, 6, 7, 9, 16, 258}) CHECK(check(pk::side::key, 128, width, 32) != code::ok);
  CHECK(check(pk::side::key, 100, 2, 32) != code::ok);
  CHECK(check(pk::side::key, 128, 2, 32, pk::transform_kind::permutation) == code::unsupported);
  CHECK(check(pk::side::value, 128, 2, 32, pk::transform_kind::basis) == code::unsupported);
  CHECK(pk::check_codec(pk::side::value, pk::make_grouped_codec(pk::side::key, 128, 2, 32)).code ==
        code::invalid_argument);
  auto spec = pk::make_grouped_codec(pk::side::key, 128, 2, 32);
  spec.leading = 1;
  CHECK(pk::check_codec(pk::side::key, spec).code == code::unsupported);
  spec = pk::make_plan_codec(pk::side::key, 128, pk::transform_kind::identity, pk::plan<4, 2, 2, 1>::widths());
  spec.kind = pk::codec_kind::grouped;
  spec.group = 32;
  CHECK(pk::check_codec(pk::side::key, spec).code == code::unsupported);
  spec.kind = pk::codec_kind::plan;
  CHECK(pk::check_codec(pk::side::key, spec).code == code::invalid_argument);  // a plan with a group size
  pk::parameters<pk::cache_format<pk::grouped_key_codec<128, 2>, pk::grouped_value_codec<128, 2>>> p;
  CHECK(pk::check_parameters(p));
  const float columns[128] = {};
  p.value.column_scale = columns;
  CHECK(pk::check_parameters(p).code == code::invalid_argument);
}

TEST_CASE("store_tiles refuses what it can see, before it writes", "[paged]") {
  tensor16 x(2, 64, 128);
  paged p(pk::make_grouped_codec(pk::side::key, 128, 2, 32), x);
  const auto before = p.storage;
  const pk::parameters<paged::format> params{p.f, {}, {}};
  const auto view = pk::make_input<4>(x.bits.data(), pk::dtype::float16, {1, 2, 64, 128});
  const pk::tile_move move{0, 0, 0};
  const auto store = [&](const pk::input_view<4>& k, const pk::input_view<4>& v, const pk::tile_move* moves,
                         std::int64_t n, const pk::pages_view& pages) {
    pk::device_report report;
    return pk::reference::store_tiles(k, v, moves, n, params, pages, report).code;
  };
  auto few = view, heads = view;
  const auto type = pk::make_input<4>(x.bits.data(), pk::dtype::float32, {1, 2, 64, 128});
  few.extent[2] = 63;
  heads.extent[1] = 1;
  auto pages = p.pages;
  pages.key_data = static_cast<std::uint8_t*>(pages.key_data) + 8;
  CHECK(store(few, few, &move, 1, p.pages) == code::shape_mismatch);
  CHECK(store(view, few, &move, 1, p.pages) == code::shape_mismatch);
  CHECK(store(heads, heads, &move, 1, p.pages) == code::shape_mismatch);
  CHECK(store(type, view, &move, 1, p.pages) == code::unsupported);
  CHECK(store(view, view, nullptr, 1, p.pages) == code::invalid_argument);
  CHECK(store(view, view, &move, -1, p.pages) == code::invalid_argument);
  CHECK(store(view, view, &move, 1, pages) == code::misaligned);
  const auto* const inside = reinterpret_cast<const pk::tile_move*>(reinterpret_cast<const char*>(&move) + 4);
  CHECK(store(view, view, inside, 1, p.pages) == code::misaligned);
  CHECK(store(few, few, nullptr, 0, p.pages) == code::ok);
  CHECK(p.storage == before);
  CHECK(store(view, view, &move, 1, p.pages) == code::ok);
  CHECK(p.storage != before);
}

TEST_CASE("format ids tell grouped codecs apart, and parameter ids see their offsets alone", "[paged]") {
  std::vector<pk::runtime_format<128>> formats;
  for (const int width : {2, 4})
    for (const int group : {32, 64})
      for (const auto transform : {pk::transform_kind::identity, pk::transform_kind::hadamard}) {
        pk::runtime_format<128> f;
        f.key_spec = pk::make_grouped_codec(pk::side::key, 128, width, group, transform);
        formats.push_back(f);
        f.key_spec = {};
        f.value_spec = pk::make_grouped_codec(pk::side::value, 128, width, group, transform);
        formats.push_back(f);
      }
  for (std::size_t i = 0; i < formats.size(); ++i)
    for (std::size_t j = 0; j < i; ++j) CHECK(pk::make_format_id(formats[i], {}) != pk::make_format_id(formats[j], {}));
  using kivi = pk::cache_format<pk::grouped_key_codec<128, 2>, pk::grouped_value_codec<128, 2>>;
  pk::runtime_format<128> f;
  f.key_spec = kivi::key();
  f.value_spec = kivi::value();
  CHECK(pk::make_format_id(kivi{}, {}) == pk::make_format_id(f, {}));
  pk::parameters<kivi> p;
  const std::uint64_t id = pk::parameters_id(p, 1);
  std::vector<float> offsets(128, 0.0f);
  p.key.channel_offset = offsets.data();
  const std::uint64_t with = pk::parameters_id(p, 1);
  CHECK(with != id);
  offsets[7] = 1.0f;
  CHECK(pk::parameters_id(p, 1) != with);
}

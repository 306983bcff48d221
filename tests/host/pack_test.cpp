// SPDX-License-Identifier: Apache-2.0
// Packs against the naive PackKV of pack_naive.hpp, element by element and size by size, and at their limits.
#include "../support/small_tests.hpp"
#include "pack_fixture.hpp"
#include "pack_naive.hpp"

using namespace host_test;

namespace {

constexpr pk::pack_granularity granularities[] = {pk::pack_granularity::token, pk::pack_granularity::vector,
                                                  pk::pack_granularity::channel, pk::pack_granularity::block};
constexpr pk::token_order orders[] = {pk::token_order::none, pk::token_order::median, pk::token_order::greedy};
constexpr pk::pack_zero zeros[] = {pk::pack_zero::integer, pk::pack_zero::floating};

/// Shapes, steps and everything else of a format at random.
pk::pack_format random_format(random_source& random) {
  const int dims[] = {64, 96, 128}, sizes[] = {2, 4, 8, 16, 32};
  const float steps[] = {0.1f, 0.2f, 0.05f, 0.02f, 0.5f, 1.0f, 0.0041f};
  pk::pack_format f;
  f.kv_heads = random.between(1, 3);
  f.batch = random.between(1, 2);
  f.pack_size = random.pick(sizes);
  f.order = random.pick(orders);
  f.element = random.chance(2) ? pk::dtype::float16 : pk::dtype::bfloat16;
  for (pk::pack_codec* c : {&f.key, &f.value}) {
    c->head_dim = static_cast<std::int16_t>(random.pick(dims));
    c->granularity = random.pick(granularities);
    c->zero = random.pick(zeros);
    c->relative_step = random.pick(steps);
  }
  return f;
}

/// Normal elements with channels and tokens of their own size, constant stretches and signed zeros.
void fill(random_source& random, tensor<4>& x) {
  const pk::input_view<4> v = x.in();
  for (std::int64_t b = 0; b < v.extent[0]; ++b)
    for (std::int64_t h = 0; h < v.extent[1]; ++h)
      for (std::int64_t t = 0; t < v.extent[2]; ++t)
        for (std::int64_t c = 0; c < v.extent[3]; ++c) {
          const float size = c % 17 == 3 ? 8.0f : 1.0f, offset = c % 31 == 5 ? 20.0f : 0.0f;
          const bool constant = t % 13 == 4 || c % 23 == 7;
          x.set(constant ? (t % 2 == 0 ? -0.0f : 0.0f) : size * random.normal() + offset, b, h, t, c);
        }
}

naive::block block_of(const tensor<4>& x, std::int64_t b, std::int64_t block) {
  const pk::input_view<4> v = x.in();
  naive::block out{static_cast<int>(v.extent[1]), static_cast<int>(v.extent[3]), {}};
  for (std::int64_t h = 0; h < v.extent[1]; ++h)
    for (std::int64_t t = 0; t < 64; ++t)
      for (std::int64_t c = 0; c < v.extent[3]; ++c) out.x.push_back(x.get(b, h, block * 64 + t, c));
  return out;
}

naive::quantised quantise(const pk::pack_codec& c, const naive::block& b) {
  return naive::quantise(b, static_cast<naive::group>(c.granularity), static_cast<naive::zero>(c.zero),
                         c.relative_step);
}

std::string describe(const pk::pack_format& f) {
  std::string text = "heads " + std::to_string(f.kv_heads) + " batch " + std::to_string(f.batch) + " order " +
                     std::to_string(static_cast<int>(f.order)) + " pack " + std::to_string(f.pack_size);
  for (const pk::pack_codec& c : {f.key, f.value})
    text += " | granularity " + std::to_string(static_cast<int>(c.granularity)) + " zero " +
            std::to_string(static_cast<int>(c.zero)) + " D " + std::to_string(c.head_dim) + " r " +
            std::to_string(c.relative_step);
  return text;
}

/// Order, codes, reconstruction and sizes of compressed packs, all from the naive implementation.
void check_against_naive(packs& p, const pack_cache& cache) {
  const pk::pack_format& f = p.format;
  REQUIRE(p.state);
  const std::int64_t tokens = p.blocks * 64;
  tensor<4> keys(pk::dtype::float32, {f.batch, f.kv_heads, tokens, f.key.head_dim});
  tensor<4> values(pk::dtype::float32, {f.batch, f.kv_heads, tokens, f.value.head_dim});
  REQUIRE(pk::reference::decompress(f, p.view(), keys.out(), values.out()));
  naive::sizes sizes[2];
  std::int64_t wrong = 0;
  for (std::int64_t block = 0; block < p.blocks; ++block) {
    std::vector<naive::integers> vectors(64);
    std::vector<naive::quantised> quantised[2];
    std::size_t first_value = 0;
    for (const pk::side which : {pk::side::key, pk::side::value}) {
      first_value = which == pk::side::value ? vectors[0].size() : 0;
      for (int b = 0; b < f.batch; ++b) {
        const naive::block x = block_of(which == pk::side::key ? cache.keys : cache.values, b, block);
        quantised[static_cast<int>(which)].push_back(quantise(f.codec(which), x));
        for (int t = 0; t < 64; ++t)
          for (int h = 0; h < x.heads; ++h)
            for (int c = 0; c < x.dim; ++c)
              vectors[static_cast<std::size_t>(t)].push_back(
                  quantised[static_cast<int>(which)].back().code[x.at(h, t, c)]);
      }
    }
    const naive::integers order =
        naive::find_order(static_cast<naive::order>(f.order), f.pack_size, vectors, first_value);
    for (int slot = 0; slot < 64; ++slot)
      wrong += order[static_cast<std::size_t>(slot)] != p.order[static_cast<std::size_t>(block * 64 + slot)];
    REQUIRE(wrong == 0);
    for (const pk::side which : {pk::side::key, pk::side::value})
      for (int b = 0; b < f.batch; ++b)
        for (int h = 0; h < f.kv_heads; ++h) {
          const int dim = f.codec(which).head_dim, side = static_cast<int>(which);
          const naive::quantised& q = quantised[side][static_cast<std::size_t>(b)];
          const std::int64_t tile = (block * f.batch + b) * f.kv_heads + h;
          pack_memory& memory = p.memory(which);
          const naive::integers codes =
              naive::decode_tile(memory.data() + memory.offsets[static_cast<std::size_t>(tile)], f.pack_size, dim);
          for (int c = 0; c < dim; ++c) {
            naive::integers slots;
            for (int slot = 0; slot < 64; ++slot) {
              const std::size_t from =
                  static_cast<std::size_t>((h * 64 + order[static_cast<std::size_t>(slot)]) * dim + c);
              slots.push_back(q.code[from]);
              wrong += codes[static_cast<std::size_t>(slot * dim + c)] != q.code[from];
              const float x = (which == pk::side::key ? keys : values).get(b, h, block * 64 + slot, c);
              wrong += !(x == q.value[from]);
            }
            sizes[side].add(slots, f.pack_size);
          }
        }
    REQUIRE(wrong == 0);
  }
  for (const pk::side which : {pk::side::key, pk::side::value}) {
    const naive::sizes& s = sizes[static_cast<int>(which)];
    const pk::pack_statistics& r = which == pk::side::key ? p.report.key : p.report.value;
    CHECK(r.values == s.values);
    CHECK(r.packs == s.packs);
    CHECK(r.payload_bits == s.payload);
    CHECK(r.distinct_codes == static_cast<int>(s.codes.size()));
    if (s.payload > 0) CHECK(std::fabs(r.published_ratio() / s.ratio() - 1.0) < 1e-12);
    CHECK(r.tile_bytes == p.memory(which).offsets.back());
    CHECK(r.tile_bytes <= pk::max_pack_bytes(f, which, p.blocks));
  }
}

/// A small format for the tests of limits: token, integer zero, one head, 64 channels.
pk::pack_format small_format(float step) {
  pk::pack_format f;
  f.key.head_dim = f.value.head_dim = 64;
  f.key.relative_step = f.value.relative_step = step;
  f.order = pk::token_order::none;
  return f;
}

pack_cache constant_cache(const pk::pack_format& f, std::int64_t tokens, float x, random_source& random) {
  pack_cache cache(f, tokens, random);
  cache.keys.fill([&] { return x; });
  cache.values.fill([&] { return x; });
  return cache;
}

}  // namespace

TEST_CASE("packs: order, codes, reconstruction and sizes are those of the naive PackKV for random formats", "[packs]") {
  const std::uint64_t seed = base_seed();
  const int formats = packkv_test::small_tests ? 8 : 24;
  for (int i = 0; i < formats; ++i) {
    random_source random(seed + static_cast<std::uint64_t>(i));
    const pk::pack_format f = random_format(random);
    INFO("seed " << seed + static_cast<std::uint64_t>(i) << " " << describe(f));
    const std::int64_t blocks = random.between(1, 2);
    pack_cache cache(f, blocks * 64 + random.below(70), random, random.chance(3) ? walk::scrambled : walk::contiguous);
    fill(random, cache.keys);
    fill(random, cache.values);
    packs p(f, cache, blocks);
    check_against_naive(p, cache);
  }
}

TEST_CASE("packs: every granularity, zero point, order and pack size agrees with the naive PackKV", "[packs]") {
  random_source random(base_seed() + 1000);
  for (const pk::pack_granularity g : granularities)
    for (const pk::pack_zero z : zeros)
      for (const pk::token_order o : orders)
        for (const int size : {2, 4, 8, 16, 32}) {
          pk::pack_format f = small_format(0.1f);
          f.key.granularity = f.value.granularity = g;
          f.key.zero = f.value.zero = z;
          f.order = o;
          f.pack_size = size;
          f.kv_heads = 2;
          INFO(describe(f));
          pack_cache cache(f, 64, random);
          fill(random, cache.keys);
          fill(random, cache.values);
          packs p(f, cache, 1);
          check_against_naive(p, cache);
        }
}

TEST_CASE("packs: the newest 128 to 191 tokens stay 16-bit", "[packs]") {
  for (std::int64_t tokens = 0; tokens < 1000; ++tokens) {
    const std::int64_t blocks = pk::coded_blocks(tokens), left = tokens - 64 * blocks;
    CHECK(blocks == std::max<std::int64_t>(0, (tokens + 64 - tokens % 64 - 192) / 64));
    CHECK((tokens < 192 ? blocks == 0 : (left >= 128 && left <= 191)));
  }
}

TEST_CASE("packs: groups of equal elements cost no payload and come back exactly", "[packs]") {
  random_source random(base_seed() + 1);
  for (const pk::pack_granularity g : granularities)
    for (const pk::pack_zero z : zeros)
      for (const float x : {0.0f, -0.0f, 1.0f, -3.25f, 65504.0f}) {
        pk::pack_format f = small_format(0.1f);
        f.key.granularity = f.value.granularity = g;
        f.key.zero = f.value.zero = z;
        f.order = pk::token_order::greedy;
        const pack_cache cache = constant_cache(f, 64, x, random);
        packs p(f, cache, 1);
        REQUIRE(p.state);
        CHECK(p.report.key.payload_bits == 0);
        CHECK(p.report.key.distinct_codes == 1);
        CHECK(p.report.key.raw_bits() == 0);
        CHECK(p.report.key.tile_bytes == 16);  // a header and four starts, padded
        for (int t = 0; t < 64; ++t) CHECK(p.order[static_cast<std::size_t>(t)] == t);  // all ties: first index wins
        tensor<4> keys(pk::dtype::float32, {1, 1, 64, 64}), values(pk::dtype::float32, {1, 1, 64, 64});
        REQUIRE(pk::reference::decompress(f, p.view(), keys.out(), values.out()));
        for (int t = 0; t < 64; ++t)
          for (int c = 0; c < 64; ++c) REQUIRE(keys.get(0, 0, t, c) == x);
      }
}

TEST_CASE("packs: 1 to 256 levels are coded, the 257th is refused and nothing is written", "[packs]") {
  random_source random(base_seed() + 2);
  for (const pk::pack_zero z : zeros)
    for (const int top : {1, 2, 3, 7, 8, 127, 128, 253, 254, 255, 256, 300, 1000}) {
      pk::pack_format f = small_format(1.0f / static_cast<float>(top));
      f.key.zero = f.value.zero = z;
      pack_cache cache = constant_cache(f, 64, 0.0f, random);
      for (int t = 0; t < 64; ++t)
        for (int c = 0; c < 64; ++c) cache.keys.set(static_cast<float>((t * 62 + c) % (top + 1)), 0, 0, t, c);
      for (int t = 0; t < 64; ++t)
        cache.keys.set(0.0f, 0, 0, t, 0), cache.keys.set(static_cast<float>(top), 0, 0, t, 1);
      packs p(f, cache, 1);
      INFO("codes 0 to " << top << ": " << p.state.message);
      if (top > 255) {
        CHECK(p.state.code == pk::status_code::unsupported);
        CHECK(p.key.untouched());
        CHECK(p.value.untouched());
        continue;
      }
      REQUIRE(p.state);
      CHECK(p.report.key.distinct_codes == top + 1);
      check_against_naive(p, cache);
    }
}

TEST_CASE("packs: an element that is not finite is refused, wherever it is, and nothing is written", "[packs]") {
  random_source random(base_seed() + 3);
  for (const pk::dtype element : {pk::dtype::float16, pk::dtype::bfloat16})
    for (const pk::pack_granularity g : granularities)
      for (const float bad : {INFINITY, -INFINITY, NAN, -NAN}) {
        pk::pack_format f = small_format(0.1f);
        f.key.granularity = f.value.granularity = g;
        f.element = element;
        pack_cache cache(f, 192, random);
        fill(random, cache.keys);
        fill(random, cache.values);
        const std::int64_t token = random.below(192);
        (random.chance(2) ? cache.keys : cache.values).set(bad, 0, 0, token, random.below(64));
        const packs p(f, cache, 3);
        CHECK(p.state.code == pk::status_code::invalid_argument);
        CHECK(p.state.detail == token / 64);
        CHECK(p.key.untouched());
        CHECK(p.value.untouched());
        CHECK(p.order == std::vector<std::uint8_t>(192, 0));
      }
}

TEST_CASE("packs: a capacity of exactly the bytes suffices, one less is refused and nothing is written", "[packs]") {
  random_source random(base_seed() + 4);
  const pk::pack_format f = small_format(0.1f);
  pack_cache cache(f, 128, random);
  fill(random, cache.keys);
  fill(random, cache.values);
  packs whole(f, cache, 2);
  REQUIRE(whole.state);
  for (const pk::side tight : {pk::side::key, pk::side::value})
    for (const int less : {0, 1, 16}) {
      const std::int64_t bytes = whole.memory(tight).offsets.back();
      pack_memory key(f, pk::side::key, 2, tight == pk::side::key ? bytes - less : 1 << 20),
          value(f, pk::side::value, 2, tight == pk::side::value ? bytes - less : 1 << 20);
      pk::pack_report report;
      const pk::status s =
          pk::reference::compress(f, cache.keys.in(), cache.values.in(), 2, key.out(), value.out(), nullptr, report);
      CHECK(static_cast<bool>(s) == (less == 0));
      if (s) continue;
      CHECK(s.code == pk::status_code::overflow);
      CHECK(s.detail == bytes);
      CHECK(key.untouched());
      CHECK(value.untouched());
      CHECK(report.key.values == 0);
    }
}

TEST_CASE("packs: formats, shapes and pointers that do not fit are refused with nothing written", "[packs]") {
  random_source random(base_seed() + 5);
  const pk::pack_format good = small_format(0.1f);
  pack_cache cache = constant_cache(good, 128, 1.0f, random);
  const auto code_of = [&](const pk::pack_format& f, std::int64_t blocks) {
    pack_memory key(good, pk::side::key, 2), value(good, pk::side::value, 2);
    pk::pack_report report;
    const pk::status s =
        pk::reference::compress(f, cache.keys.in(), cache.values.in(), blocks, key.out(), value.out(), nullptr, report);
    if (!s) CHECK((key.untouched() && value.untouched()));
    return s.code;
  };
  using code = pk::status_code;
  CHECK(code_of(good, 2) == code::ok);
  CHECK(code_of(good, 0) == code::ok);
  CHECK(code_of(good, 3) == code::shape_mismatch);
  CHECK(code_of(good, -1) == code::invalid_argument);
  CHECK(code_of(good, std::int64_t{1} << 60) != code::ok);
  const auto with = [&](auto change) {
    pk::pack_format f = good;
    change(f);
    return code_of(f, 2);
  };
  CHECK(with([](auto& f) { f.pack_size = 3; }) == code::invalid_argument);
  CHECK(with([](auto& f) { f.pack_size = 64; }) == code::invalid_argument);
  CHECK(with([](auto& f) { f.pack_size = 1; }) == code::invalid_argument);
  CHECK(with([](auto& f) { f.pack_size = -16; }) == code::invalid_argument);
  CHECK(with([](auto& f) { f.key.relative_step = 0.0f; }) == code::invalid_argument);
  CHECK(with([](auto& f) { f.key.relative_step = 1.5f; }) == code::invalid_argument);
  CHECK(with([](auto& f) { f.value.relative_step = NAN; }) == code::invalid_argument);
  CHECK(with([](auto& f) { f.key.head_dim = 128; }) == code::shape_mismatch);
  CHECK(with([](auto& f) { f.value.head_dim = 80; }) == code::unsupported);
  CHECK(with([](auto& f) { f.kv_heads = 2; }) == code::shape_mismatch);
  CHECK(with([](auto& f) { f.kv_heads = 0; }) == code::invalid_argument);
  CHECK(with([](auto& f) { f.batch = 2; }) == code::shape_mismatch);
  CHECK(with([](auto& f) { f.batch = 1 << 30; }) == code::overflow);
  CHECK(with([](auto& f) { f.element = pk::dtype::float32; }) == code::unsupported);
  CHECK(with([](auto& f) { f.element = pk::dtype::bfloat16; }) == code::invalid_argument);
  CHECK(with([](auto& f) { f.order = static_cast<pk::token_order>(3); }) == code::invalid_argument);
  CHECK(with([](auto& f) { f.key.granularity = static_cast<pk::pack_granularity>(4); }) == code::invalid_argument);

  pack_memory key(good, pk::side::key, 2), value(good, pk::side::value, 2);
  pk::pack_report report;
  const auto into = [&](auto change) {
    pk::pack_side out = key.out();
    change(out);
    return pk::reference::compress(good, cache.keys.in(), cache.values.in(), 2, out, value.out(), nullptr, report).code;
  };
  CHECK(into([](auto& s) { s.offsets = nullptr; }) == code::invalid_argument);
  CHECK(into([](auto& s) { s.ranges = nullptr; }) == code::invalid_argument);
  CHECK(into([](auto& s) { s.data = nullptr; }) == code::invalid_argument);
  CHECK(into([](auto& s) { s.data += 8; }) == code::misaligned);
  CHECK(into([](auto& s) { s.capacity = -1; }) == code::invalid_argument);
}

TEST_CASE("packs: a worked example of the published sizes", "[packs]") {
  // One head, 64 channels, one block; channel 0 holds 0..63 by token, channel 1 is 63, all others are 0. Group: block,
  // r = 1/63, so codes are the elements. Packs of 16 tokens: channel 0 spans 16 codes = 4 bits, all others 0 bits.
  random_source random(base_seed());
  pk::pack_format f = small_format(1.0f / 63.0f);
  f.key.granularity = pk::pack_granularity::block;
  pack_cache cache = constant_cache(f, 64, 0.0f, random);
  for (int t = 0; t < 64; ++t) cache.keys.set(static_cast<float>(t), 0, 0, t, 0), cache.keys.set(63.0f, 0, 0, t, 1);
  packs p(f, cache, 1);
  REQUIRE(p.state);
  CHECK(p.report.key.payload_bits == 4 * 16 * 4);
  CHECK(p.report.key.packs == 4 * 64);
  CHECK(p.report.key.distinct_codes == 64);
  CHECK(p.report.key.raw_bits() == 6);
  CHECK(p.report.key.published_bits() == 256 + 256 * (6 + 3));  // minima of 6 bits, widths of ceil(log2(7)) = 3
  CHECK(p.report.key.payload_bits_per_value() == 256.0 / 4096.0);
  // Honest: 4 bytes of header, 4 starts, 256 widths of 3 bits, 256 minima of 6 bits, 2 words a group, padded to 16.
  CHECK(p.report.key.tile_bytes == (4 + 8 + 96 + 192 + 4 * 8 + 15) / 16 * 16);
  CHECK(pk::stored_bytes(f, pk::side::key, 1, p.report.key.tile_bytes) == 4 + 16 + p.report.key.tile_bytes);
}

TEST_CASE("packs: damaged bytes are refused or decode within their bounds", "[packs]") {
  const std::uint64_t seed = base_seed() + 77;
  int refused = 0;
  for (int i = 0; i < 200; ++i) {
    random_source random(seed + static_cast<std::uint64_t>(i));
    pk::pack_format f = random_format(random);
    f.order = pk::token_order::none;
    pack_cache cache(f, 128, random);
    fill(random, cache.keys);
    fill(random, cache.values);
    packs p(f, cache, 2);
    REQUIRE(p.state);
    REQUIRE(pk::reference::check_packs(f, p.view()));
    // The exact bytes in a buffer of their own, so that a memory checker sees any access beyond.
    const pk::side which = random.chance(2) ? pk::side::key : pk::side::value;
    pack_memory& m = p.memory(which);
    const std::size_t size = static_cast<std::size_t>(m.offsets.back());
    std::uint8_t* const bytes = static_cast<std::uint8_t*>(std::aligned_alloc(16, size));
    std::memcpy(bytes, m.data(), size);
    switch (random.below(4)) {
      case 0:
        m.offsets[static_cast<std::size_t>(random.below(static_cast<int>(m.offsets.size())))] =
            random.chance(2) ? static_cast<std::int64_t>(random.bits()) : 16 * random.below(200);
        break;
      case 1:
        m.ranges[static_cast<std::size_t>(random.below(static_cast<int>(m.ranges.size())))].low =
            static_cast<std::uint16_t>(random.bits());
        break;
      case 2:  // the header and the starts of a tile
        bytes[m.offsets[static_cast<std::size_t>(random.below(static_cast<int>(m.offsets.size()) - 1))] +
              random.below(12)] ^= static_cast<std::uint8_t>(1 << random.below(8));
        break;
      default:
        for (int k = random.between(1, 4); k > 0; --k)
          bytes[random.below(static_cast<int>(size))] = static_cast<std::uint8_t>(random.bits());
    }
    pk::packs_view view = p.view();
    pk::const_pack_side& side = which == pk::side::key ? view.key : view.value;
    side.data = bytes;
    side.size = static_cast<std::int64_t>(size);
    tensor<4> keys(pk::dtype::float32, {f.batch, f.kv_heads, 128, f.key.head_dim});
    tensor<4> values(pk::dtype::float32, {f.batch, f.kv_heads, 128, f.value.head_dim});
    if (!pk::reference::decompress(f, view, keys.out(), values.out())) ++refused;
    std::free(bytes);
  }
  CHECK(refused > 50);
}

TEST_CASE("packs: a code beyond 255 in damaged bytes is refused", "[packs]") {
  random_source random(base_seed() + 91);
  pk::pack_format f = small_format(1.0f / 255.0f);
  f.order = pk::token_order::none;
  pack_cache cache = constant_cache(f, 64, 0.0f, random);
  for (int t = 0; t < 64; ++t)
    for (int c = 0; c < 64; ++c) cache.keys.set(static_cast<float>((t * 62 + c) % 256), 0, 0, t, c);
  for (int t = 0; t < 64; ++t) cache.keys.set(0.0f, 0, 0, t, 0), cache.keys.set(255.0f, 0, 0, t, 1);
  packs p(f, cache, 1);
  REQUIRE(p.state);
  REQUIRE(pk::reference::check_packs(f, p.view()));
  pack_memory& m = p.memory(pk::side::key);
  std::uint8_t* const tile = m.data();
  const pk::pack_tile shape{f.pack_size, f.key.head_dim, tile[0], tile[1]};
  REQUIRE(shape.min_bits == 8);           // channel 1 is 255 everywhere
  tile[shape.minima_offset() + 2] = 255;  // of a pack with several codes
  const pk::status s = pk::reference::check_packs(f, p.view());
  CHECK(s.code == pk::status_code::corrupt);
  CHECK(std::string(s.message).find("beyond 255") != std::string::npos);
}

TEST_CASE("packs: a range that spans more than a float holds is refused", "[packs]") {
  random_source random(base_seed() + 78);
  pk::pack_format f;
  f.element = pk::dtype::bfloat16;
  f.order = pk::token_order::none;
  pack_cache cache(f, 64, random);
  fill(random, cache.keys);
  fill(random, cache.values);
  packs p(f, cache, 1);
  REQUIRE(p.state);
  tensor<4> keys(pk::dtype::float32, {1, 1, 64, 128}), values(pk::dtype::float32, {1, 1, 64, 128});
  const std::vector<std::uint8_t> before = keys.bytes();
  p.key.ranges[5] = {0xff7f, 0x7f7f};  // the least and the greatest bfloat16
  CHECK(pk::reference::decompress(f, p.view(), keys.out(), values.out()).code == pk::status_code::corrupt);
  CHECK((keys.bytes() == before));
  p.key.ranges[5] = {0xff7f, 0};
  CHECK(pk::reference::decompress(f, p.view(), keys.out(), values.out()));
}

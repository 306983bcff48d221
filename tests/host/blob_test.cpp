// SPDX-License-Identifier: Apache-2.0
#include <packkv/cache/blob.hpp>
#include <string>

#include "fixture.hpp"

namespace pk = packkv;
using namespace host_test;

namespace {

using format = pk::cache_format<pk::key_codec<64, pk::permutation, pk::rms_scale, pk::plan<1, 0, 0, 0>>,
                                pk::value_codec<64, pk::hadamard, pk::rms_scale, pk::plan<1, 0, 0, 0>>>;
constexpr std::int64_t pair_bytes = format::key_tile_bytes + format::value_tile_bytes;

static_assert(pk::encoded_bytes(format{}, 0) == 64);
static_assert(pk::encoded_bytes(format{}, 6) == 64 + 6 * pair_bytes);
static_assert(pk::encoded_bytes(format{}, -1) == 0);
static_assert(pk::encoded_bytes(format{}, std::int64_t{1} << 62) == 0);

void randomise(pool& p, random_source& random) {
  for (std::size_t i = 0; i < p.size(); ++i) p.bytes()[i] = static_cast<std::uint8_t>(random.bits());
}

struct fixture {
  random_source random{seed_of(900)};
  pool source{format{}, 2, 2, 1, pool_kind::padded};
  pool target{format{}, 2, 2, 1, pool_kind::one_pool, 0xee};
  pk::blob_id id{11, 22, 3, 4};
  std::vector<std::uint8_t> blob = std::vector<std::uint8_t>(pk::encoded_bytes(format{}, 2), std::uint8_t{0xaa});
  std::vector<std::uint8_t> before = target.snapshot();
  fixture() {
    randomise(source, random);
    REQUIRE(pk::write_blob(format{}, id, source.pages, 1, blob.data(), size()));
  }
  std::int64_t size() const { return static_cast<std::int64_t>(blob.size()); }
  pk::status read(std::int64_t bytes) { return pk::read_blob(format{}, id, blob.data(), bytes, target.pages, 0); }
  bool refused_untouched(std::int64_t bytes) {
    return read(bytes).code == pk::status_code::corrupt && target.snapshot() == before;
  }
};

}  // namespace

TEST_CASE("the hash of blobs is XXH64", "[blob]") {
  CHECK(pk::hash64("", 0) == 0xef46db3751d8e999u);
  CHECK(pk::hash64("abc", 3) == 0x44bc2cf5ad770999u);
  CHECK(pk::hash64("Nobody inspects the spammish repetition", 39) == 0xfbcea83c8a378bf1u);
}

TEST_CASE("the format id of a format is a constant of the memory format", "[blob]") {
  using flagship =
      pk::cache_format<pk::key_codec<128, pk::identity, pk::rms_scale, pk::plan<4, 2, 1, 1>>,
                       pk::value_codec<128, pk::hadamard, pk::rms_scale, pk::plan<2, 2, 2, 2, 2, 2, 2, 2>>>;
  const pk::format_id id = pk::make_format_id(flagship{}, {1, 2, 3, 4});
  CHECK(id.low == 0x40351239052f5507u);
  CHECK(id.high == 0x411649aab6840400u);
}

TEST_CASE("reading a written blob restores the tiles and nothing else, for any format, page and head range", "[blob]") {
  for (int round = 0; round < 60; ++round) {
    const std::uint64_t seed = seed_of(910 + static_cast<std::uint64_t>(round));
    INFO("seed " << seed);
    random_source random(seed);
    pk::runtime_format<96, 192> f;
    f.key_spec = random_codec(random, pk::side::key, 96);
    f.value_spec = random_codec(random, pk::side::value, 192);
    const int heads = random.between(1, 4), tiles = random.between(1, 3);
    const pk::head_range from{random.below(heads), 1}, to{random.below(heads), 1};
    const bool whole = random.chance(2);
    pool source(f, 3, heads, tiles, random.pick(pool_kinds)), target(f, 2, heads, tiles, random.pick(pool_kinds), 0xee);
    randomise(source, random);
    const int count = whole ? heads : 1;
    const std::int64_t size = pk::encoded_bytes(f, static_cast<std::int64_t>(count) * tiles);
    std::vector<std::uint8_t> blob(static_cast<std::size_t>(size) + 9, std::uint8_t{0x77});
    std::uint8_t* at = blob.data() + 1;  // unaligned on purpose
    const pk::blob_id id{random.bits(), random.bits(), random.below(99), random.below(99)};
    const std::vector<std::uint8_t> source_before = source.snapshot();
    if (whole) {
      REQUIRE(pk::write_blob(f, id, source.pages, 2, at, size));
      REQUIRE(pk::read_blob(f, id, at, size, target.pages, 1));
    } else {
      REQUIRE(pk::write_blob(f, id, source.pages, 2, from, at, size + 5));
      REQUIRE(pk::read_blob(f, id, at, size, target.pages, 1, to));
    }
    CHECK((source.snapshot() == source_before));
    CHECK(blob[0] == 0x77);
    CHECK(blob[static_cast<std::size_t>(size) + 1] == 0x77);
    std::vector<std::uint8_t> expected(target.size(), std::uint8_t{0xee});
    for (int i = 0; i < count; ++i)
      for (int t = 0; t < tiles; ++t)
        for (const pk::side which : {pk::side::key, pk::side::value})
          std::memcpy(expected.data() + target.offset(which, 1, whole ? i : to.first, t),
                      source.tile(which, 2, whole ? i : from.first, t),
                      static_cast<std::size_t>(source.tile_bytes(which)));
    CHECK((target.snapshot() == expected));
  }
}

TEST_CASE("the bytes of a blob are those of docs/format.md section 9", "[blob]") {
  fixture f;
  const std::vector<std::uint8_t>& b = f.blob;
  CHECK(std::string(b.begin(), b.begin() + 4) == "PKKV");
  const auto number = [&](std::size_t at, std::size_t bytes) {
    std::uint64_t x = 0;
    for (std::size_t i = bytes; i-- > 0;) x = x * 256 + b[at + i];
    return x;
  };
  CHECK(number(4, 4) == 1);
  CHECK(number(8, 8) == pk::hash64(b.data() + 16, f.size() - 16));
  CHECK(number(32, 8) == 2 * pair_bytes);
  CHECK(number(40, 4) == 2);
  CHECK(number(44, 4) == 1);
  CHECK(number(48, 4) == 256);  // 1 x 2 x 16 words and 64 scales
  CHECK(number(52, 4) == 256);
  CHECK(number(56, 8) == 0);
  std::uint8_t text[104] = {};  // 9.2
  text[0] = 0, text[1] = 1, text[2] = 64, text[6] = 4, text[8] = 1;
  text[40] = 0, text[41] = 2, text[42] = 64, text[46] = 4, text[48] = 1;
  text[80] = 11, text[88] = 22, text[96] = 3, text[100] = 4;
  CHECK(number(16, 8) == pk::hash64(text, 104, 0));
  CHECK(number(24, 8) == pk::hash64(text, 104, 1));
  for (int head = 0; head < 2; ++head) {
    const std::uint8_t* tiles = b.data() + 64 + head * pair_bytes;
    CHECK(std::memcmp(tiles, f.source.tile(pk::side::key, 1, head, 0), format::key_tile_bytes) == 0);
    CHECK(std::memcmp(tiles + format::key_tile_bytes, f.source.tile(pk::side::value, 1, head, 0),
                      format::value_tile_bytes) == 0);
  }
}

TEST_CASE("every single flipped bit of a blob is refused and nothing is written", "[blob]") {
  fixture f;
  int accepted = 0;
  for (std::size_t i = 0; i < f.blob.size(); ++i)
    for (int bit = 0; bit < 8; ++bit) {
      f.blob[i] ^= static_cast<std::uint8_t>(1 << bit);
      if (!f.refused_untouched(f.size())) ++accepted;
      f.blob[i] ^= static_cast<std::uint8_t>(1 << bit);
    }
  CHECK(accepted == 0);
  CHECK(f.read(f.size()));
}

TEST_CASE("a blob cut at any length, or longer than it says, is refused and nothing is written", "[blob]") {
  fixture f;
  int accepted = 0;
  for (std::int64_t n = 0; n < f.size(); ++n) {
    // A copy of exactly n bytes, so that a sanitizer sees any read behind its end.
    const std::vector<std::uint8_t> cut(f.blob.begin(), f.blob.begin() + n);
    const std::uint8_t nothing = 0;
    const pk::status s = pk::read_blob(format{}, f.id, n == 0 ? &nothing : cut.data(), n, f.target.pages, 0);
    if (s.code != pk::status_code::corrupt || f.target.snapshot() != f.before) ++accepted;
  }
  CHECK(accepted == 0);
  for (const int more : {1, 8, 16, 64}) {
    std::vector<std::uint8_t> longer = f.blob;
    longer.resize(longer.size() + static_cast<std::size_t>(more));
    const auto size = static_cast<std::int64_t>(longer.size());
    CHECK(pk::read_blob(format{}, f.id, longer.data(), size, f.target.pages, 0).code == pk::status_code::corrupt);
  }
  CHECK((f.target.snapshot() == f.before));
}

TEST_CASE("hostile headers with a matching checksum are refused and nothing is written", "[blob]") {
  const std::uint64_t values[] = {
      0, 1, 3, 0x7fffffff, 0x80000000u, 0xffffffffu, 0x7fffffffffffffffu, 0xffffffffffffffffu};
  const struct {
    std::size_t at, bytes;
  } fields[] = {{0, 4}, {4, 4}, {16, 8}, {24, 8}, {32, 8}, {40, 4}, {44, 4}, {48, 4}, {52, 4}, {56, 8}};
  for (const auto& field : fields)
    for (const std::uint64_t value : values) {
      fixture f;
      const std::vector<std::uint8_t> good = f.blob;
      for (std::size_t i = 0; i < field.bytes; ++i) f.blob[field.at + i] = static_cast<std::uint8_t>(value >> (8 * i));
      if (f.blob == good) continue;
      const std::uint64_t sum = pk::hash64(f.blob.data() + 16, f.size() - 16);
      for (unsigned i = 0; i < 8; ++i) f.blob[8 + i] = static_cast<std::uint8_t>(sum >> (8 * i));
      INFO("field at " << field.at << " value " << value);
      CHECK(f.refused_untouched(f.size()));
    }
}

TEST_CASE("random bytes and random damage are refused and nothing is written", "[blob]") {
  const std::uint64_t seed = seed_of(990);
  INFO("seed " << seed);
  random_source random(seed);
  fixture f;
  const std::vector<std::uint8_t> good = f.blob;
  int accepted = 0;
  for (int round = 0; round < 3000; ++round) {
    f.blob = good;
    const int damage = random.between(1, 40);
    for (int i = 0; i < damage; ++i)
      f.blob[static_cast<std::size_t>(random.below(static_cast<int>(good.size())))] =
          static_cast<std::uint8_t>(random.bits());
    if (round % 3 == 0)
      for (std::uint8_t& b : f.blob) b = static_cast<std::uint8_t>(random.bits());
    if (f.blob != good && !f.refused_untouched(f.size())) ++accepted;
  }
  CHECK(accepted == 0);
}

TEST_CASE("a blob of another format, model, layer, head or set of parameters is refused", "[blob]") {
  fixture f;
  const auto read_as = [&](const pk::blob_id& id) {
    const pk::status s = pk::read_blob(format{}, id, f.blob.data(), f.size(), f.target.pages, 0);
    CHECK((f.target.snapshot() == f.before));
    return s.code;
  };
  CHECK(read_as({12, 22, 3, 4}) == pk::status_code::corrupt);
  CHECK(read_as({11, 23, 3, 4}) == pk::status_code::corrupt);
  CHECK(read_as({11, 22, 4, 4}) == pk::status_code::corrupt);
  CHECK(read_as({11, 22, 3, 5}) == pk::status_code::corrupt);
  // The same size in bytes, another meaning.
  using twin = pk::cache_format<pk::key_codec<64, pk::hadamard, pk::rms_scale, pk::plan<1, 0, 0, 0>>,
                                pk::value_codec<64, pk::hadamard, pk::rms_scale, pk::plan<1, 0, 0, 0>>>;
  static_assert(twin::key_tile_bytes == format::key_tile_bytes);
  CHECK(pk::read_blob(twin{}, f.id, f.blob.data(), f.size(), f.target.pages, 0).code == pk::status_code::corrupt);
  // The same bytes in all, other heads and tiles.
  pool other(format{}, 2, 1, 2, pool_kind::one_pool, 0xee);
  CHECK(pk::read_blob(format{}, f.id, f.blob.data(), f.size(), other.pages, 0).code == pk::status_code::corrupt);
  CHECK(pk::read_blob(format{}, f.id, f.blob.data(), f.size(), f.target.pages, 0, {0, 1}).code ==
        pk::status_code::corrupt);
  CHECK((f.target.snapshot() == f.before));
}

TEST_CASE("format ids differ for every two of many codecs, and do not depend on static or run-time types", "[blob]") {
  const std::uint64_t seed = seed_of(995);
  INFO("seed " << seed);
  random_source random(seed);
  std::vector<pk::runtime_format<128>> formats;
  std::vector<pk::format_id> ids;
  for (int i = 0; i < 200; ++i) {
    pk::runtime_format<128> f;
    f.key_spec = random_codec(random, pk::side::key, 128);
    f.value_spec = random_codec(random, pk::side::value, 128);
    formats.push_back(f);
    ids.push_back(pk::make_format_id(f, {}));
  }
  const auto same = [](const pk::codec_spec& a, const pk::codec_spec& b) {
    return a.kind == b.kind && a.transform == b.transform && a.leading == b.leading &&
           std::memcmp(a.strips.width, b.strips.width, sizeof a.strips.width) == 0;
  };
  int wrong = 0;
  for (std::size_t i = 0; i < ids.size(); ++i)
    for (std::size_t j = 0; j < i; ++j) {
      const bool equal =
          same(formats[i].key_spec, formats[j].key_spec) && same(formats[i].value_spec, formats[j].value_spec);
      if ((ids[i] == ids[j]) != equal) ++wrong;
    }
  CHECK(wrong == 0);
  pk::runtime_format<64> dynamic;
  dynamic.key_spec = format::key(), dynamic.value_spec = format::value();
  CHECK(pk::make_format_id(dynamic, {7, 0, 1, 2}) == pk::make_format_id(format{}, {7, 0, 1, 2}));
}

TEST_CASE("the id of parameters depends on every array that the format reads", "[blob]") {
  random_source random(seed_of(996));
  pk::runtime_format<64> f;
  f.key_spec =
      pk::make_plan_codec(pk::side::key, 64, pk::transform_kind::permutation, flat_plan(pk::side::key, 64, 2), 2);
  f.value_spec = pk::make_element_codec(pk::codec_kind::fp8, 64);
  parameter_arrays arrays;
  auto p = arrays.make(f, 2, random, true);
  const std::uint64_t id = pk::parameters_id(p, 2);
  CHECK(pk::parameters_id(p, 2) == id);
  arrays.column[0].back() *= 2.0f;
  CHECK(pk::parameters_id(p, 2) != id);
  arrays.column[0].back() *= 0.5f;
  CHECK(pk::parameters_id(p, 2) == id);
  std::swap(arrays.order[0][64], arrays.order[0][65]);
  CHECK(pk::parameters_id(p, 2) != id);
  std::swap(arrays.order[0][64], arrays.order[0][65]);
  arrays.leading[0][3] *= 2.0f;
  CHECK(pk::parameters_id(p, 2) != id);
  arrays.leading[0][3] *= 0.5f;
  p.value.tensor_scale = 0.5f;
  CHECK(pk::parameters_id(p, 2) != id);
  p.value.tensor_scale = 0.25f;
  p.key.tensor_scale = 3.0f;  // not read by a plan
  CHECK(pk::parameters_id(p, 2) == id);
  arrays.offset[0][5] += 1.0f;
  CHECK(pk::parameters_id(p, 2) != id);
  arrays.offset[0][5] -= 1.0f;
  p.key.column_scale = nullptr;
  CHECK(pk::parameters_id(p, 2) != id);
  f.key_spec.transform = pk::transform_kind::basis;
  p = arrays.make(f, 2, random, true);
  const std::uint64_t with_basis = pk::parameters_id(p, 2);
  arrays.basis[0].back() *= 2.0f;
  CHECK(pk::parameters_id(p, 2) != with_basis);
}

TEST_CASE("wrong arguments of the blob calls are refused and nothing is written", "[blob]") {
  fixture f;
  std::vector<std::uint8_t> out(f.blob.size(), std::uint8_t{0x55});
  const std::vector<std::uint8_t> out_before = out;
  const auto write = [&](const pk::pages_view& pages, std::int64_t page, pk::head_range heads, void* to,
                         std::int64_t n) {
    const pk::status s = pk::write_blob(format{}, f.id, pages, page, heads, to, n);
    CHECK((out == out_before));
    return s.code;
  };
  const auto read = [&](const pk::pages_view& pages, std::int64_t page, pk::head_range heads, const void* from,
                        std::int64_t n) {
    const pk::status s = pk::read_blob(format{}, f.id, from, n, pages, page, heads);
    CHECK((f.target.snapshot() == f.before));
    return s.code;
  };
  const auto both = [&](const pk::pages_view& pages, std::int64_t page, pk::head_range heads, pk::status_code code) {
    CHECK(write(pages, page, heads, out.data(), f.size()) == code);
    CHECK(read(pages, page, heads, f.blob.data(), f.size()) == code);
  };
  const pk::status_code invalid = pk::status_code::invalid_argument;
  const pk::pages_view& good = f.target.pages;
  for (const std::int64_t page : {std::int64_t{-1}, std::int64_t{2}, std::int64_t{1} << 40})
    both(good, page, {0, 2}, invalid);
  for (const pk::head_range heads :
       {pk::head_range{0, 0}, {0, 3}, {1, 2}, {-1, 1}, {2, 1}, {2147483647, 1}, {1, 2147483647}})
    both(good, 0, heads, invalid);
  pk::pages_view bad = good;
  bad.key_data = nullptr;
  both(bad, 0, {0, 2}, invalid);
  bad = good;
  bad.value_page_stride += 8;
  both(bad, 0, {0, 2}, pk::status_code::misaligned);
  bad = good;
  bad.kv_heads = 0;
  both(bad, 0, {0, 1}, invalid);
  CHECK(write(good, 0, {0, 2}, nullptr, f.size()) == invalid);
  CHECK(write(good, 0, {0, 2}, out.data(), f.size() - 1) == invalid);
  CHECK(write(good, 0, {0, 2}, out.data(), 0) == invalid);
  CHECK(write(good, 0, {0, 2}, out.data(), -1) == invalid);
  CHECK(read(good, 0, {0, 2}, nullptr, f.size()) == invalid);
  CHECK(read(good, 0, {0, 2}, f.blob.data(), -1) == invalid);
  pk::runtime_format<64> wrong;
  wrong.key_spec = pk::make_element_codec(pk::codec_kind::float16, 128);
  CHECK(pk::write_blob(wrong, f.id, good, 0, out.data(), f.size()).code == pk::status_code::shape_mismatch);
  CHECK((out == out_before));
}

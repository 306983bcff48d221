// SPDX-License-Identifier: Apache-2.0
// The kernels that compress packs whose channels lie side by side: the bytes of the reference, for every head dim, pack
// size and element type, for units of one and of several batch rows, and next to the boundaries of codes.
#include <algorithm>
#include <cmath>
#include <packkv/device/packs.cuh>
#include <string>
#include <vector>

#include "../support/catch.hpp"
#include "pack_data.hpp"

using namespace packkv_test;
namespace pk = packkv;

namespace {

using pk::dtype;
using pk::pack_granularity;
using pk::pack_zero;
using pk::side;
using pk::token_order;

/// Compresses on the device and compares everything with the reference.
void check_compress(pack_case& c) {
  INFO(name_of(c.format) << ", heads " << c.format.kv_heads << ", batch " << c.format.batch << ", blocks " << c.blocks);
  REQUIRE(c.compress());
  device_side key(c.format, side::key, c.blocks), value(c.format, side::value, c.blocks);
  device_array<std::uint8_t> slots(c.order.size());
  slots.poison();
  c.report.assign(std::vector<pk::device_report>(1));
  pk::exec e = c.exec();
  device_array<std::uint8_t> workspace(static_cast<std::size_t>(pk::pack_workspace_bytes(c.format, c.blocks)));
  workspace.poison();
  e.workspace = workspace.data();
  e.workspace_bytes = workspace.size();
  const auto call = [&] {
    return pk::compress(c.format, c.keys.device(), c.values.device(), c.blocks, key.out(), value.out(),
                        {nullptr, slots.data()}, e);
  };
  REQUIRE((c.blocks == 1 ? after_failures(call) : call()));  // several launches, again and again: small calls alone
  CHECK(slots.host() == c.order);
  CHECK(key.equals(c.key));
  CHECK(value.equals(c.value));
  CHECK(c.flags() == 0);
}

/// The first on a GPU, the second on the executor, which is slow.
constexpr int count_of([[maybe_unused]] int gpu, [[maybe_unused]] int executor) {
#if defined(PACKKV_SIMT_EXECUTOR)
  return executor;
#else
  return gpu;
#endif
}

pk::pack_codec random_codec(random_source& random) {
  constexpr int dims[] = {64, 96, 128, 192, 256, 512};
  return codec(random.one_in(2) ? pack_granularity::token : pack_granularity::vector,
               random.one_in(2) ? pack_zero::integer : pack_zero::floating, dims[random.between(0, 5)],
               std::exp(-5.5f * static_cast<float>(random.uniform())));
}

}  // namespace

TEST_CASE("the fast encoder of packs writes the reference's bytes") {
  random_source random(21);
  constexpr int rounds = count_of(200, 40);
  for (int round = 0; round < rounds; ++round) {
    pk::pack_codec key = random_codec(random), value = random_codec(random);
    if (round % 2 == 0) key.head_dim = value.head_dim = 128;  // has kernels of its own
    const int heads = random.one_in(6) ? random.between(4, 20) : random.between(1, 4);
    pack_case c(format_of(static_cast<token_order>(random.between(0, 2)), 1 << random.between(1, 5),
                          random.one_in(2) ? dtype::float16 : dtype::bfloat16, heads, random.between(1, 2), key, value),
                random.between(1, heads > 4 ? 1 : 3), walk::contiguous, random.between(0, 9));
    c.fill(random);
    check_compress(c);
  }
}

namespace {

/// Codes of eight elements a thread, by thread::codes_of, of a group from low to high.
template <bool BFloat>
__global__ void code_elements(pk::pack_codec codec, pk::pack_range range, const std::uint16_t* elements,
                              std::uint8_t* codes, std::uint32_t* found, float* offset) {
  std::uint32_t flags = 0;
  const pk::thread::code_step step = pk::thread::make_code_step<BFloat>(codec, range, flags);
  const std::int64_t first = 8 * (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x);
  const pk::detail::bytes16 own = pk::detail::load16(elements + first);
  bool near = false;
  pk::detail::bytes8 x = pk::thread::codes_of<BFloat>(step, own, near);
  if (near) x = pk::thread::divided_codes<BFloat>(codec, range, own);
  for (int i = 0; i < 8; ++i) codes[first + i] = static_cast<std::uint8_t>(x.word[i / 4] >> 8 * (i % 4));
  if (first == 0) {
    *found = flags;
    *offset = step.offset;
  }
}

/// Every element between the ends of a group; whether the products were near enough for codes.
template <bool BFloat>
bool check_codes(const pk::pack_codec& codec, std::uint16_t low, std::uint16_t high) {
  const dtype type = BFloat ? dtype::bfloat16 : dtype::float16;
  std::vector<std::uint16_t> elements;
  for (int i = pk::ordered_bits(low); i <= pk::ordered_bits(high); ++i)
    elements.push_back(pk::element_bits(static_cast<std::int16_t>(i)));
  while (elements.size() % 256 != 0) elements.push_back(low);
  const device_array<std::uint16_t> device(elements);
  device_array<std::uint8_t> codes(elements.size());
  codes.poison();
  device_array<std::uint32_t> found(1);
  device_array<float> offset(1);
  const pk::pack_range range{low, high};
  REQUIRE(pk::detail::launch(code_elements<BFloat>, dim3(static_cast<unsigned>(elements.size() / 256)), 32,
                             cudaStream_t{}, codec, range, device.data(), codes.data(), found.data(), offset.data()));
  const pk::pack_step step = pk::make_pack_step(codec, pk::range_value(type, low), pk::range_value(type, high));
  const std::vector<std::uint8_t> got = codes.host();
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < elements.size(); ++i) {
    const float code = pk::encode_code(codec, step, pk::range_value(type, elements[i]));
    wrong += got[i] != static_cast<std::uint8_t>(std::min(std::max(code, 0.0f), 255.0f)) ? 1 : 0;
  }
  INFO("low " << low << " high " << high << " r " << codec.relative_step << " bfloat " << BFloat);
  CHECK(wrong == 0);
  const bool overflow = pk::encode_code(codec, step, pk::range_value(type, high)) > 255.0f;
  CHECK(found.host()[0] == (overflow ? pk::report_code_overflow : 0u));
  return offset.host()[0] != 0.0f;
}

}  // namespace

TEST_CASE("codes by products are those by division, for every element of a group and steps whose boundaries it hits") {
  random_source random(22);
  constexpr int rounds = count_of(400, 40);
  int by_products = 0;
  for (int round = 0; round < rounds; ++round) {
    // Steps that are powers of two, or nearly, put elements on boundaries and beside them.
    const float steps[] = {0.125f,        0.0625f,       0.1f,
                           0.2f,          1.0f / 15.0f,  1.0f / 127.0f,
                           1.0f / 125.0f, 1.0f / 255.0f, std::exp(-5.0f * static_cast<float>(random.uniform()))};
    const pk::pack_codec c = codec(pack_granularity::token, random.one_in(2) ? pack_zero::integer : pack_zero::floating,
                                   64, steps[random.between(0, 8)]);
    const float size = std::ldexp(1.0f, random.between(-12, 8));
    float low = -size * static_cast<float>(random.between(0, 16)) / 8.0f;
    float high = low + size * static_cast<float>(random.between(1, 32)) / 8.0f;
    if (random.one_in(3)) low *= 1.0f + 0.01f * static_cast<float>(random.uniform());
    if (random.one_in(6)) std::swap(low, high), low = -low, high = -high;
    if (low > high) std::swap(low, high);
    by_products += check_codes<false>(c, pk::range_bits(dtype::float16, low), pk::range_bits(dtype::float16, high));
    by_products += check_codes<true>(c, pk::range_bits(dtype::bfloat16, low), pk::range_bits(dtype::bfloat16, high));
  }
  CHECK(by_products > rounds);  // most of them
  // Ends of the formats: subnormal, largest, of one value.
  const pk::pack_codec c = codec(pack_granularity::token, pack_zero::integer, 64, 0.1f);
  CHECK(check_codes<false>(c, 0, 1));
  check_codes<true>(c, 0, 1);
  check_codes<true>(c, 0x8001, 0x0001);
  check_codes<false>(c, 0xfbff, 0x7bff);
  check_codes<true>(c, 0xfe00, 0x7e00);
  CHECK(check_codes<false>(c, 0x3c00, 0x3c00));
}

TEST_CASE("the mean without a division is the rounded one") {
  std::int64_t wrong = 0;
  for (std::uint32_t n = 1; n <= 64; ++n)
    for (std::uint32_t sum = 0; sum <= 255 * n; ++sum)
      wrong += pk::rounded_mean(sum, n, pk::mean_reciprocal(n)) != pk::rounded_mean(sum, n) ? 1 : 0;
  CHECK(wrong == 0);
}

TEST_CASE("greedy orders of ties, zeros and codes of every length, in shared and in global memory") {
  random_source random(23);
  const auto with = [](int heads, float r, int pack_size) {
    const pk::pack_codec c = codec(pack_granularity::vector, pack_zero::floating, 64, r);
    return format_of(token_order::greedy, pack_size, dtype::float16, heads, 1, c, c);
  };
  for (const int heads : {1, 5, 29}) {  // 29: more than shared memory holds
    if (heads == 29) REQUIRE(pk::pack_workspace_bytes(with(heads, 0.1f, 16), 1, 228) > 0);
    for (const float r : {1.0f, 0.3f, 0.1f, 1.0f / 100.0f, 1.0f / 250.0f}) {
      pack_case c(with(heads, r, heads == 5 ? 4 : 16), 2);
      for (pack_tensor* x : {&c.keys, &c.values})
        x->fill([&](std::int64_t h, std::int64_t t, std::int64_t channel) {
          if (t / 64 == 1)
            return static_cast<float>(t % 4 == 0 ? 0 : (t % 3 + h) * (channel % 5));  // tokens that are equal
          return random.normal();
        });
      check_compress(c);
    }
  }
}

TEST_CASE("sides of other granularities and strides beside fast ones, in every order") {
  random_source random(24);
  for (const token_order o : {token_order::none, token_order::median, token_order::greedy})
    for (const bool keys : {false, true}) {
      const pk::pack_codec fast = codec(pack_granularity::token, pack_zero::integer, 96, 0.05f);
      const pk::pack_codec other = codec(pack_granularity::channel, pack_zero::integer, 64, 0.1f);
      pack_case c(format_of(o, 8, dtype::bfloat16, 2, 2, keys ? fast : other, keys ? other : fast), 2);
      c.fill(random);
      check_compress(c);
      pack_case strided(format_of(o, 16, dtype::float16, 2, 1, fast, fast), 2, walk::interleaved);
      strided.fill(random);
      check_compress(strided);
    }
}

TEST_CASE("more blocks than run at once, heads that span units, and medians of codes in memory") {
  random_source random(25);
  constexpr int blocks = count_of(1500, 40);
  const pk::pack_codec small = codec(pack_granularity::token, pack_zero::integer, 64, 0.1f);
  pack_case many(format_of(token_order::median, 16, dtype::float16, 1, 1, small, small), blocks);
  many.fill(random);
  check_compress(many);
  for (const int batch : {1, 3}) {
    pack_case c(format_of(token_order::median, 16, dtype::bfloat16, 19, batch, small,
                          codec(pack_granularity::vector, pack_zero::floating, 192, 0.02f)),
                2);
    c.fill(random);
    check_compress(c);
  }
}

TEST_CASE("medians of tokens whose elements lie next to the boundaries of codes") {
  random_source random(27);
  constexpr int rounds = count_of(400, 24);
  for (int round = 0; round < rounds; ++round) {
    constexpr int dims[] = {64, 96, 128, 192, 512};
    constexpr float steps[] = {1.0f, 0.5f, 0.2f, 0.1f, 1.0f / 30, 1.0f / 31, 1.0f / 40, 2.0f / 61};
    const int dim = dims[round % 5], most_heads = pk::warp::pack_row_shape(dim).heads();
    const int heads = random.one_in(2) ? most_heads : random.between(1, most_heads), total = heads * dim;
    const float r = round % 2 == 0 ? steps[round / 2 % 8] : std::exp(-3.6f * static_cast<float>(random.uniform()));
    const bool floating = random.one_in(2);
    const pk::pack_codec v =
        codec(pack_granularity::token, floating ? pack_zero::floating : pack_zero::integer, dim, r);
    const dtype type = random.one_in(2) ? dtype::bfloat16 : dtype::float16;
    const float ulp = type == dtype::bfloat16 ? 0x1p-8f : 0x1p-11f;
    pack_case c(format_of(token_order::median, 16, type, heads, 1, v, v), 2);
    struct {
      float low, high, nearby;
      int lowest;  ///< elements that are `low`, all others `high`, so that the median just is or is not; -1: any
      bool first;  ///< whether these are the first
    } token[128];
    for (auto& t : token) {  // ends of either sign, of very different size, and symmetric ones
      const float size = std::exp2(static_cast<float>(random.between(-9, 9)));
      t.low = size * random.normal();
      t.high = random.one_in(3) ? -t.low : t.low + size * static_cast<float>(random.uniform());
      if (t.high < t.low) std::swap(t.low, t.high);
      // The median: one of the elements around where some code begins.
      const float scale = (t.high - t.low) * r, zero = floating ? 0.0f : std::rint(t.low / scale);
      const float code = std::floor(static_cast<float>(random.uniform()) / r);
      const float begin = (floating ? t.low : 0.0f) + (code + zero + 0.5f) * scale;
      t.nearby = begin * (1.0f + static_cast<float>(random.between(-1, 1)) * ulp);
      t.nearby = std::min(std::max(t.nearby, t.low), t.high);
      t.lowest = random.one_in(2) ? total / 2 - random.between(0, 1) : -1;
      t.first = random.one_in(2);
    }
    const auto fill = [&](std::int64_t head, std::int64_t i, std::int64_t channel) {
      const auto& t = token[i];
      if (head == 0 && channel < 2) return channel == 0 ? t.low : t.high;
      const auto at = static_cast<int>(head * dim + channel);
      if (t.lowest >= 0) return (t.first ? at - 1 : total - at) < t.lowest ? t.low : t.high;
      const double u = random.uniform();
      return u < 0.25 ? t.low : u < 0.5 ? t.high : t.nearby;
    };
    for (pack_tensor* x : {&c.keys, &c.values}) x->fill(fill);
    check_compress(c);
  }
}

TEST_CASE("units of fewer heads, as less shared memory needs them, write the same bytes") {
  random_source random(26);
  const pk::pack_codec of_token = codec(pack_granularity::token, pack_zero::integer, 128, 0.1f);
  const pk::pack_codec of_heads = codec(pack_granularity::vector, pack_zero::integer, 128, 0.1f);
  const pk::pack_format f = format_of(token_order::none, 16, dtype::float16, 3, 1, of_token, of_heads);
  for (const int most : {1, 2}) {
    pack_case c(f, 2);
    c.fill(random);
    REQUIRE(c.compress());
    device_side key(f, side::key, 2), value(f, side::value, 2);
    const auto of = [&](side which, const pk::input_view<4>& in, const pk::pack_side& out) {
      return pk::kernel::pack_encode_side{
          {f, which, in, out, 2, nullptr, c.report.data()}, most, pk::kernel::pack_units(f, which, most).count(f, 2)};
    };
    REQUIRE(pk::detail::encode_packs<false, 16>(
        {of(side::key, c.keys.device(), key.out()), of(side::value, c.values.device(), value.out())}, cudaStream_t{}));
    CHECK(key.equals(c.key));
    CHECK(value.equals(c.value));
    CHECK(c.flags() == 0);
  }
}

TEST_CASE("tokens that cannot be coded are NaN and reported, and the others of their block are not changed") {
  random_source random(27);
  for (const int heads : {2, 17}) {
    const pk::pack_codec fast = codec(pack_granularity::token, pack_zero::integer, 64, 0.1f);
    const pk::pack_format f = format_of(token_order::none, 16, dtype::bfloat16, heads, 1, fast, fast);
    struct damage {
      float first, second;
      std::uint32_t flag;
    };
    for (const damage d :
         {damage{NAN, 1.0f, pk::report_nonfinite_input}, damage{-INFINITY, INFINITY, pk::report_nonfinite_input},
          damage{-3e38f, 3e38f, pk::report_scale_overflow}}) {
      pack_case c(f, 1);
      c.fill(random);
      for (int h = 0; h < heads; ++h)
        for (int i = 0; i < 64; ++i) c.keys.set(0, h, 5, i, 0.0f);
      REQUIRE(c.compress());
      c.key.ranges[5] = {0x7fff, 0x7fff};
      c.keys.set(0, heads - 1, 5, 60, d.first);
      c.keys.set(0, 0, 5, 3, d.second);
      c.keys.upload();
      device_side key(f, side::key, 1), value(f, side::value, 1);
      REQUIRE(pk::compress(f, c.keys.device(), c.values.device(), 1, key.out(), value.out(), {}, c.exec()));
      CHECK(key.equals(c.key));
      CHECK(value.equals(c.value));
      CHECK(c.flags() == d.flag);
    }
  }
}

TEST_CASE("the workspace of packs is asked for where codes do not fit shared memory, and a small one is refused") {
  random_source random(28);
  const pk::pack_codec wide = codec(pack_granularity::token, pack_zero::integer, 512, 0.1f);
  pk::pack_format f = format_of(token_order::greedy, 16, dtype::float16, 8, 1, wide, wide);
  pack_case c(f, 1);
  c.fill(random);
  device_side key(f, side::key, 1), value(f, side::value, 1);
  device_array<std::uint8_t> slots(64);
  const std::int64_t bytes = pk::pack_workspace_bytes(f, 1);
  CHECK(bytes > 64 * 8 * 1024);
  CHECK(pk::pack_workspace_bytes(f, 1000) > 100 * bytes / 2);
  device_array<std::uint8_t> workspace(static_cast<std::size_t>(bytes));
  pk::exec e = c.exec();
  const auto run = [&] {
    return pk::compress(f, c.keys.device(), c.values.device(), 1, key.out(), value.out(), {nullptr, slots.data()}, e);
  };
  CHECK(run().code == pk::status_code::invalid_argument);
  e.workspace = workspace.data();
  e.workspace_bytes = workspace.size() - 1;
  const pk::status s = run();
  CHECK(s.code == pk::status_code::workspace_too_small);
  CHECK(s.detail == bytes);
  CHECK(key.offsets.host()[0] == -1);  // as poisoned
  e.workspace_bytes = workspace.size();
  CHECK(run());
  for (const token_order o : {token_order::none, token_order::median}) {
    f.order = o;
    CHECK(pk::pack_workspace_bytes(f, 1) == 0);
  }
  f.order = token_order::greedy;
  f.kv_heads = 2;
  CHECK(pk::pack_workspace_bytes(f, 1, 228) == 0);
  CHECK(pk::pack_workspace_bytes(f, 1) > 0);
  f.pack_size = 3;
  CHECK(pk::pack_workspace_bytes(f, 1) == 0);
}
